"""The folder of a sweep: what is there after it was cut off anywhere, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from twotower.sweep.folder import SweepFolder
from twotower.sweep.metrics import Row
from twotower.towers.errors import InvalidRequestError

OF = {"model": "pystdlib 12", "seed": 0}
ROW = Row((1, 2), "ab", "stop", (-0.5, -1.25), 1, 2, 3, 4, {"exact": 1.0}, (-0.5, -1.0), 2, 3)


def test_points_and_outputs_come_back(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path / "a" / "b", OF)
    folder.write_rows("steps, block 8, steps 2", [ROW])
    folder.add({"name": "steps, block 8, steps 2", "tokens": 2})
    again = SweepFolder(tmp_path / "a" / "b", OF)
    assert list(again.points) == ["steps, block 8, steps 2"]
    assert again.points["steps, block 8, steps 2"]["tokens"] == 2
    assert again.read_rows("steps, block 8, steps 2") == [ROW]


def test_outputs_of_a_point_that_has_not_ended_do_not_count(tmp_path: Path) -> None:
    SweepFolder(tmp_path, OF).write_rows("ar", [ROW])
    assert SweepFolder(tmp_path, OF).read_rows("ar") is None


def test_a_line_that_was_cut_off_is_taken_away(tmp_path: Path) -> None:
    SweepFolder(tmp_path, OF).add({"name": "ar"})
    path = tmp_path / "points.jsonl"
    with path.open("a") as file:
        file.write('{"name": "verif')
    again = SweepFolder(tmp_path, OF)
    assert list(again.points) == ["ar"]
    again.add({"name": "verified"})
    assert [json.loads(line)["name"] for line in path.read_text().splitlines()] == [
        "ar",
        "verified",
    ]


def test_another_identity_is_refused_with_what_differs(tmp_path: Path) -> None:
    SweepFolder(tmp_path, OF).add({"name": "ar"})
    with pytest.raises(InvalidRequestError) as refused:
        SweepFolder(tmp_path, {"model": "other 34", "seed": 0})
    assert "model pystdlib 12 there, other 34 now" in str(refused.value)
    assert "seed" not in str(refused.value)
    assert "--fresh" in str(refused.value)


def test_fresh_begins_anew(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path, OF)
    folder.write_rows("ar", [ROW])
    folder.add({"name": "ar"})
    (tmp_path / "notes.txt").write_text("mine")
    assert SweepFolder(tmp_path, {"seed": 1}, fresh=True).points == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt"]


def test_damage_in_the_middle_is_no_resume(tmp_path: Path) -> None:
    (tmp_path / "points.jsonl").write_text("no\n")
    with pytest.raises(InvalidRequestError, match="expected lines of JSON"):
        SweepFolder(tmp_path, OF)
