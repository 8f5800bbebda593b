"""The files of a part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from tests.support.batch_rows import JobFolders, bad_row, good_row
from twotower.batch.join import join_parts
from twotower.batch.sink import PARQUET_SCHEMA, Format, PartNames, PartSink


def names(folders: JobFolders) -> list[str]:
    return sorted(path.name for path in folders.parts.iterdir())


def test_good_rows_and_errors_are_apart_and_in_order(tmp_path: Path) -> None:
    folders = JobFolders(tmp_path)
    part = folders.write(3, [good_row(9, {"prompt": "p"}), bad_row(4), good_row(2), bad_row(1)])
    assert names(folders) == [f"{part}.errors.jsonl", f"{part}.jsonl"]
    good = (folders.parts / f"{part}.jsonl").read_text().splitlines()
    assert [json.loads(line)["custom_id"] for line in good] == ["id-2", "id-9"]
    bad = (folders.parts / f"{part}.errors.jsonl").read_text().splitlines()
    assert [json.loads(line)["error"]["line"] for line in bad] == [2, 5]


def test_parquet(tmp_path: Path) -> None:
    folders = JobFolders(tmp_path, "parquet")
    part = folders.write(0, [good_row(9), bad_row(4), good_row(2)])
    assert names(folders) == [f"{part}.errors.jsonl", f"{part}.parquet"]
    table = pyarrow.parquet.read_table(folders.parts / f"{part}.parquet")
    assert table.schema == PARQUET_SCHEMA
    assert table["text"].to_pylist() == ["text 2", "text 9"]


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_files_without_rows_are_not_there(tmp_path: Path, format: Format) -> None:
    folders = JobFolders(tmp_path, format)
    part = folders.write(0, [good_row(1), bad_row(2)])
    # A second attempt of the task, for which the row went well.
    folders.write(0, [good_row(1), good_row(2)])
    assert names(folders) == [f"{part}.{format}"]
    folders.write(0, [bad_row(1), bad_row(2)])
    assert names(folders) == [f"{part}.errors.jsonl"]


def test_no_parts_name_begins_anothers() -> None:
    names = [PartNames().get_filename_for_task("ab", task) for task in (1, 10, 10**6, 10**7)]
    assert not any(a != b and b.startswith(a) for a in names for b in names)
    # Ray Data takes what stands before a dot as the name.
    assert not any("." in name for name in names)


def test_a_folder_of_fsspec() -> None:
    filesystem = fsspec.filesystem("memory")
    sink = PartSink("memory://sink/parts", names=["in.jsonl"])
    sink.on_write_start()
    assert filesystem.isdir("/sink/parts")
    filesystem.rm("/sink", recursive=True)


def test_a_write_that_fails_for_a_moment_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [OSError("AWS Error SLOW_DOWN during PutObject")]
    whole = PartSink._write_jsonl

    def halfway(sink: PartSink, table: pyarrow.Table, stream: Any) -> None:
        if failures:
            stream.write(b"half a li")
            raise failures.pop()
        whole(sink, table, stream)

    monkeypatch.setattr(PartSink, "_write_jsonl", halfway)
    monkeypatch.setattr("ray._common.retry.time.sleep", lambda _: None)
    folders = JobFolders(tmp_path)
    folders.checkpoint(folders.write(0, [good_row(1)]), [1])
    assert join_parts(*folders.paths, str(tmp_path / "all.jsonl")).rows == 1
    assert not failures
