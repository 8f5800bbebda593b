"""Rows are undone so that a crash at any step loses none and doubles none."""

from __future__ import annotations

import shutil
from itertools import count
from pathlib import Path

import numpy
import pytest

from tests.support.batch_rows import JobFolders, good_row
from twotower.batch.join import join_parts
from twotower.batch.output_lines import row_of_error
from twotower.batch.parts import PartFolder
from twotower.batch.recovery import repair_parts, retry_rows

GOOD = [[1, 2], [], [6], [8, 9]]
BAD = [[0, 3], [4, 5], [], [7]]


@pytest.fixture
def folders(tmp_path: Path) -> JobFolders:
    folders = JobFolders(tmp_path)
    for part, (good, bad) in enumerate(zip(GOOD, BAD, strict=True)):
        folders.commit(part, good, bad)
    return folders


def done(folders: JobFolders) -> list[int]:
    parts = PartFolder(*folders.paths)
    rows = [parts.rows(name) for name in parts.committed()]
    return sorted(numpy.concatenate(rows).tolist())


def joined(folders: JobFolders) -> tuple[list[int], list[int]]:
    output = folders.root / "all.jsonl"
    summary = join_parts(*folders.paths, str(output), ordered=True)
    errors = Path(summary.errors_path).read_bytes() if summary.errors_path else b""
    return (
        [row_of_error(line) for line in output.read_bytes().splitlines()],
        [row_of_error(line) for line in errors.splitlines()],
    )


def test_errors_are_undone_and_good_rows_are_not(folders: JobFolders) -> None:
    assert retry_rows(*folders.paths) == 5
    assert done(folders) == [1, 2, 6, 8, 9]
    assert joined(folders) == ([1, 2, 6, 8, 9], [])
    assert not list(folders.parts.glob("*.errors.jsonl"))
    assert retry_rows(*folders.paths) == 0


def test_rows_that_ran_again_are_there_once(folders: JobFolders) -> None:
    retry_rows(*folders.paths)
    folders.commit(10, good=[0, 3, 4], bad=[5, 7])
    assert joined(folders) == ([0, 1, 2, 3, 4, 6, 8, 9], [5, 7])


class CrashError(Exception):
    """Where a test ends a program."""


CHANGES = [(PartFolder, "undo"), (PartFolder, "keep_rows"), (PartFolder, "delete_file")]


def crash_before(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The change of number `step`, from 0, and all after it are not made."""
    steps = count()
    for owner, name in CHANGES:
        change = getattr(owner, name)

        def counted(*args: object, change: object = change) -> None:
            if next(steps) >= step:
                raise CrashError
            assert callable(change)
            change(*args)

        monkeypatch.setattr(owner, name, counted)


# Three parts have errors, and each takes two changes.
@pytest.mark.parametrize("step", range(6))
def test_a_crash_between_two_steps(
    folders: JobFolders, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    with monkeypatch.context() as patched:
        crash_before(patched, step)
        with pytest.raises(CrashError):
            retry_rows(*folders.paths)
    # Every row is either done or to be done, and what is done is joined, once.
    rows = done(folders)
    good, errors = joined(folders)
    assert sorted([*good, *errors]) == rows
    assert good == [1, 2, 6, 8, 9]
    repair_parts(*folders.paths)
    retry_rows(*folders.paths)
    assert done(folders) == [1, 2, 6, 8, 9]
    folders.commit(10, good=[row for row in range(10) if row not in done(folders)])
    assert joined(folders) == (list(range(10)), [])


def test_a_crash_before_the_new_checkpoint_takes_its_place(
    folders: JobFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise CrashError

    with monkeypatch.context() as patched:
        patched.setattr("twotower.batch.parts.PartFolder._replace", crash)
        with pytest.raises(CrashError):
            retry_rows(*folders.paths)
    assert done(folders) == list(range(10))
    assert joined(folders) == ([1, 2, 6, 8, 9], [0, 3, 4, 5, 7])
    # What it leaves is a pending checkpoint of no part: Ray Data deletes it and no data.
    (left,) = folders.checkpoints.glob("*.pending.parquet")
    prefix = left.name.removesuffix(".pending.parquet")
    assert not [path for path in folders.parts.iterdir() if path.name.startswith(prefix)]


def test_a_sound_job_needs_no_repair(folders: JobFolders) -> None:
    begun = folders.write(9, [good_row(99)])
    folders.checkpoint(begun, [99], pending=True)
    before = sorted(path.name for path in folders.parts.iterdir())
    assert repair_parts(*folders.paths) == 0
    assert sorted(path.name for path in folders.parts.iterdir()) == before
    assert done(folders) == list(range(10))


def test_a_part_that_is_pending_again_is_undone(folders: JobFolders) -> None:
    folders.checkpoint(folders.commit(20, good=[50, 51]), [50, 51], pending=True)
    assert repair_parts(*folders.paths) == 1
    assert done(folders) == list(range(10))


def test_a_part_without_files_is_undone_and_files_without_a_part_are_deleted(
    folders: JobFolders,
) -> None:
    lost = folders.commit(20, good=[50])
    (folders.parts / f"{lost}.jsonl").unlink()
    orphan = folders.write(21, [good_row(51)])
    other = folders.parts / "job.json"
    other.write_text("{}")
    assert repair_parts(*folders.paths) == 1
    assert done(folders) == list(range(10))
    assert not (folders.parts / f"{orphan}.jsonl").exists()
    assert other.exists()


def test_a_job_without_a_run_has_nothing_to_undo(tmp_path: Path) -> None:
    folders = JobFolders(tmp_path)
    shutil.rmtree(folders.parts)
    shutil.rmtree(folders.checkpoints)
    assert retry_rows(*folders.paths) == 0
    assert repair_parts(*folders.paths) == 0


def test_a_part_with_rows_of_an_earlier_one_is_undone_as_a_whole(folders: JobFolders) -> None:
    """As two runs at a time leave them."""
    folders.commit(4, good=[9, 10], bad=[11])
    assert repair_parts(*folders.paths) == 1
    assert done(folders) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert joined(folders) == ([1, 2, 6, 8, 9], [0, 3, 4, 5, 7])


def test_errors_that_a_crash_has_left_go_with_the_next_start(
    folders: JobFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        crash_before(patched, 1)
        with pytest.raises(CrashError):
            retry_rows(*folders.paths)
    before = {path.name for path in folders.parts.glob("*.errors.jsonl")}
    assert repair_parts(*folders.paths) == 0
    after = {path.name for path in folders.parts.glob("*.errors.jsonl")}
    assert len(before - after) == 1
    good, bad = joined(folders)
    assert sorted([*good, *bad]) == done(folders)
