"""Rows of a part, piece by piece."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.batch_rows import JobFolders
from twotower.batch import part_chunks, sink
from twotower.batch.output_lines import row_of_error
from twotower.batch.part_chunks import CommittedPart
from twotower.batch.parts import PartFolder


def part_of(folders: JobFolders, name: str) -> CommittedPart:
    folder = PartFolder(*folders.paths)
    return CommittedPart(folder, name, folder.rows(name), has_errors=True)


def test_lines_longer_than_a_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_chunks, "_PIECE_BYTES", 50)
    folders = JobFolders(tmp_path)
    part = part_of(folders, folders.commit(0, good=[1, 5, 6, 9], bad=[2, 3]))
    chunks = list(part.good_chunks("jsonl"))
    assert len(chunks) == 4
    rows = [row for chunk in chunks for row in chunk.rows.tolist()]
    lines = [row_of_error(line) for chunk in chunks for line in chunk.data]
    assert rows == lines == [1, 5, 6, 9]
    assert part.error_rows().tolist() == [2, 3]


def test_groups_of_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sink, "_ROWS_PER_GROUP", 3)
    folders = JobFolders(tmp_path, "parquet")
    part = part_of(folders, folders.commit(0, good=range(10, 17), bad=[2]))
    chunks = list(part.good_chunks("parquet"))
    assert [chunk.data["row"].to_pylist() for chunk in chunks] == [
        [10, 11, 12],
        [13, 14, 15],
        [16],
    ]


def test_errors_that_are_to_be_done_again_do_not_count(tmp_path: Path) -> None:
    folders = JobFolders(tmp_path)
    name = folders.commit(0, good=[1, 4], bad=[2, 3])
    folders.checkpoint(name, [1, 3, 4])
    part = part_of(folders, name)
    assert part.error_rows().tolist() == [3]
    (chunk,) = part.good_chunks("jsonl")
    assert chunk.rows.tolist() == [1, 4]
