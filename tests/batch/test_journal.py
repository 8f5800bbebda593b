from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("pyarrow")

from twotower.batch.journal import JobPlaces, begin
from twotower.towers.errors import ConfigError, InvalidRequestError

FACTS = {"model": {"name": "m", "fingerprint": "f"}, "parameters": {"max_tokens": 8}, "seed": 0}


def test_a_file_has_its_parts_beside_it_a_folder_in_it(tmp_path: Path) -> None:
    file = JobPlaces.of(f"{tmp_path}/out.parquet", None)
    assert (file.format, file.file) == ("parquet", f"{tmp_path}/out.parquet")
    assert file.parts == f"{tmp_path}/out.parquet.job/parts"
    folder = JobPlaces.of(f"{tmp_path}/out/", "parquet")
    assert (folder.format, folder.file, folder.parts) == ("parquet", None, f"{tmp_path}/out")
    assert folder.journal == f"{tmp_path}/out/_job/job.json"
    assert (
        JobPlaces.of("memory://bucket/out", None).checkpoints
        == "memory://bucket/out/_job/checkpoints"
    )
    with pytest.raises(InvalidRequestError, match=r"format: got 'parquet', expected jsonl"):
        JobPlaces.of("out.jsonl", "parquet")


def test_the_same_job_goes_on_and_another_is_refused_by_what_differs(tmp_path: Path) -> None:
    places = JobPlaces.of(f"{tmp_path}/out.jsonl", None)
    assert not begin(places, FACTS)
    assert begin(places, FACTS)
    other = {**FACTS, "parameters": {"max_tokens": 9, "mode": "ar"}, "model": {"name": "m"}}
    with pytest.raises(ConfigError) as caught:
        begin(places, other)
    text = str(caught.value)
    assert "parameters.max_tokens was 8 and is 9" in text
    assert 'parameters.mode was null and is "ar"' in text
    assert 'model.fingerprint was "f" and is null' in text
    assert "seed" not in text


def test_clear_leaves_nothing_of_the_job_and_all_else(tmp_path: Path) -> None:
    places = JobPlaces.of(f"{tmp_path}/out.jsonl", None)
    begin(places, FACTS)
    for path in (places.file, f"{places.parts}/a.jsonl", f"{places.checkpoints}/a.parquet"):
        assert path is not None
        Path(path).write_text("x")
    Path(tmp_path, "other.jsonl").write_text("mine")
    places.clear()
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["other.jsonl"]
    assert not begin(places, FACTS)


@pytest.mark.parametrize("name", ["out.jsonl", "out"])
def test_files_of_no_job_are_neither_written_over_nor_cleared(tmp_path: Path, name: str) -> None:
    places = JobPlaces.of(f"{tmp_path}/{name}", None)
    strange = tmp_path / name if places.file is not None else tmp_path / name / "mine.txt"
    strange.parent.mkdir(exist_ok=True)
    strange.write_text("mine")
    places.clear()
    with pytest.raises(ConfigError, match="no job has"):
        begin(places, FACTS)
    assert strange.read_text() == "mine"


def test_a_damaged_journal_says_what_to_do(tmp_path: Path) -> None:
    places = JobPlaces.of(f"{tmp_path}/out.jsonl", None)
    begin(places, FACTS)
    Path(places.journal).write_text('{"model": ')
    with pytest.raises(ConfigError, match="damaged; --fresh begins again"):
        begin(places, FACTS)
