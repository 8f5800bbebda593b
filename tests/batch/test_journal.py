from __future__ import annotations

from pathlib import Path

import pytest
from pyarrow import fs

from twotower.batch.journal import JobPlaces, alone, begin
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
    for path in (
        places.file,
        f"{places.parts}/part-0a-0000000000.jsonl",
        f"{places.checkpoints}/a.parquet",
    ):
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


def test_a_job_that_was_killed_before_its_journal_begins_again(tmp_path: Path) -> None:
    for name in ("out", "out.jsonl"):
        places = JobPlaces.of(f"{tmp_path}/{name}", None)
        places.make()
        assert not begin(places, FACTS)


def test_a_folder_begins_afresh_and_keeps_what_is_not_the_jobs(tmp_path: Path) -> None:
    places = JobPlaces.of(f"{tmp_path}/out", None)
    begin(places, FACTS)
    names = ("part-0a-0000000000.jsonl", "part-0a-0000000000.errors.jsonl", "README.md")
    for name in names:
        Path(places.parts, name).write_text("x")
    places.clear()
    assert sorted(path.name for path in Path(places.parts).iterdir()) == ["README.md", "_job"]
    Path(places.parts, "README.md").unlink()
    assert not begin(places, {**FACTS, "seed": 1})


def test_errors_of_another_job_are_not_taken_for_its_own(tmp_path: Path) -> None:
    Path(tmp_path, "out.errors.jsonl").write_text("theirs")
    with pytest.raises(ConfigError, match=r"out\.errors\.jsonl is there already"):
        begin(JobPlaces.of(f"{tmp_path}/out.parquet", None), FACTS)


@pytest.mark.parametrize(
    "output", ["", "-", "a.jsonl.gz", "a.json", "out.csv", "s3://b/o.jsonl?x=1"]
)
def test_what_can_be_no_output_is_refused(output: str) -> None:
    with pytest.raises(InvalidRequestError, match="output: got"):
        JobPlaces.of(output, None)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    Path(tmp_path, "x.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is a file"):
        begin(JobPlaces.of(f"{tmp_path}/x.txt", None), FACTS)


def test_the_output_is_no_input(tmp_path: Path) -> None:
    local = fs.LocalFileSystem()
    file = JobPlaces.of(f"{tmp_path}/out.jsonl", None)
    folder = JobPlaces.of(f"{tmp_path}/out", None)
    owned = [
        (file.owns(local, f"{tmp_path}/{name}"), folder.owns(local, f"{tmp_path}/{name}"))
        for name in ("out.jsonl", "out.errors.jsonl", "out/part.jsonl", "in.jsonl")
    ]
    assert owned == [(True, False), (True, False), (False, True), (False, False)]


def test_two_runs_of_a_job_do_not_work_at_a_time(tmp_path: Path) -> None:
    places = JobPlaces.of(f"{tmp_path}/out.jsonl", None)
    begin(places, FACTS)
    first = alone(places)
    first.__enter__()
    with pytest.raises(ConfigError, match="being worked on already"), alone(places):
        pass
    first.__exit__(None, None, None)
    with alone(places):
        pass
