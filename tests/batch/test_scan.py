"""The scan of an input: counts, fingerprint, and rows that repeat a custom_id."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from twotower.batch import scan as scan_module
from twotower.batch.inputs import find_inputs
from twotower.batch.lines import row_number
from twotower.batch.scan import InputSummary, scan
from twotower.towers.errors import InvalidRequestError


def write_lines(path: Path, records: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def scan_of(*paths: Path) -> InputSummary:
    return scan(find_inputs([str(path) for path in paths]))


def test_counts_and_progress(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "a"}\n\n{bad\n')
    (tmp_path / "b.csv").write_bytes(b"prompt\nx\ny,z\n")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b"1\n2\n3"))
    pyarrow.parquet.write_table(pyarrow.table({"x": [1, 2]}), tmp_path / "d.parquet")
    files = find_inputs([str(tmp_path)])
    steps: list[int] = []
    summary = scan(files, progress=steps.append)
    assert summary.rows == (2, 2, 3, 2)
    assert summary.total_rows == 9
    assert sum(steps) == sum(file.size for file in files)
    assert summary.duplicates == ()
    assert summary.files == files


def test_an_empty_file(tmp_path: Path) -> None:
    assert scan_of(write_lines(tmp_path / "a.jsonl", [])).rows == (0,)


def test_the_fingerprint_is_that_of_the_contents(tmp_path: Path) -> None:
    one = write_lines(tmp_path / "a.jsonl", [{"prompt": "a"}])
    same = write_lines(tmp_path / "z.jsonl", [{"prompt": "a"}])
    other = write_lines(tmp_path / "b.jsonl", [{"prompt": "b"}])
    joined = write_lines(tmp_path / "c.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    other_kind = tmp_path / "a.csv"
    other_kind.write_bytes(one.read_bytes())
    prints = [
        scan_of(*paths).fingerprint
        for paths in ([one], [one, other], [other, one], [joined], [other_kind])
    ]
    assert len(set(prints)) == 5
    assert scan_of(same).fingerprint == prints[0]


def test_the_first_row_has_the_name(tmp_path: Path) -> None:
    first = write_lines(
        tmp_path / "a.jsonl",
        [{"prompt": "", "custom_id": "x"}, {"prompt": "p", "id": "y"}, {"prompt": "p"}],
    )
    second = write_lines(
        tmp_path / "b.jsonl",
        [
            {"prompt": "p", "custom_id": "y"},
            [],
            {"custom_id": "z", "method": "POST", "url": "/v1/completions", "body": {}},
            {"prompt": "p", "custom_id": "x"},
            {"prompt": "p", "custom_id": "row-2"},
            {"prompt": "p", "custom_id": "x"},
        ],
    )
    summary = scan_of(first, second)
    assert summary.duplicates == tuple(row_number(1, record) for record in (0, 3, 4, 5))


def test_names_in_parquet(tmp_path: Path) -> None:
    columns = {"custom_id": ["a", "b", "a", None], "prompt": ["p"] * 4, "big": ["x" * 99] * 4}
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    assert scan_of(path).duplicates == (2,)


def test_equal_hashes_of_different_names_are_no_duplicates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan_module, "_hash", lambda name: len(name))
    names = ["ab", "cd", "efg", "ab", "hi"]
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "p", "custom_id": name} for name in names])
    assert scan_of(path).duplicates == (3,)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"1\n")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InvalidRequestError, match=r"b\.parquet"):
        scan_of(tmp_path)
