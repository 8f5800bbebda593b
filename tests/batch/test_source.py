"""Blocks of rows of an input, as Ray Data reads them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from twotower.batch import source as source_module
from twotower.batch.inputs import InputFile, find_inputs
from twotower.batch.lines import row_number
from twotower.batch.requests import BatchDefaults, RowError, parse_request
from twotower.batch.scan import scan
from twotower.batch.source import ROW_SCHEMA, InputSource, read_blocks


@pytest.fixture
def files(tmp_path: Path) -> tuple[InputFile, ...]:
    records = [{"prompt": f"p {index}", "custom_id": f"c{index % 9}"} for index in range(10)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "b.csv").write_text("prompt,custom_id\nx,c3\ny,d\n")
    return find_inputs([str(tmp_path)])


def test_blocks_have_so_many_rows(files: tuple[InputFile, ...]) -> None:
    blocks = list(read_blocks(files[0], 3, 4))
    assert [block.num_rows for block in blocks] == [4, 4, 2]
    assert all(block.schema == ROW_SCHEMA for block in blocks)
    rows = [row for block in blocks for row in block["row"].to_pylist()]
    assert rows == [row_number(3, record) for record in range(10)]


def test_blocks_of_long_lines_have_fewer(
    files: tuple[InputFile, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "_BLOCK_CHARACTERS", 100)
    assert [block.num_rows for block in read_blocks(files[0], 0, 64)] == [3, 3, 3, 1]


def test_a_task_reads_a_file(files: tuple[InputFile, ...]) -> None:
    source = InputSource(files, rows_per_block=8, duplicates=scan(files).duplicates)
    tasks = pickle.loads(pickle.dumps(source.get_read_tasks(5)))
    assert [list(task.metadata.input_files) for task in tasks] == [[file.path] for file in files]
    blocks = [list(task()) for task in tasks]
    assert [[block.num_rows for block in one] for one in blocks] == [[8, 2], [2]]
    assert source.estimate_inmemory_data_size() == sum(file.size for file in files)


def test_rows_that_repeat_a_name_are_refused(files: tuple[InputFile, ...]) -> None:
    source = InputSource(files, duplicates=scan(files).duplicates)
    refused = {}
    for task in source.get_read_tasks(1):
        for block in task():
            for row in block.to_pylist():
                try:
                    parse_request(row["row"], row["line"], BatchDefaults())
                except RowError as error:
                    refused[row["row"]] = (error.code, error.custom_id)
    assert refused == {
        row_number(0, 9): ("duplicate_custom_id", "c0"),
        row_number(1, 0): ("duplicate_custom_id", "c3"),
    }
