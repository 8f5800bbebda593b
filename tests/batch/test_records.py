"""Records of files: nothing that a file holds raises, and each record comes once."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from twotower.batch import records
from twotower.batch.inputs import InputFile, find_inputs
from twotower.batch.lines import read_fault
from twotower.batch.records import read_records
from twotower.batch.requests import BatchDefaults, BatchRequest, RowError, parse_request
from twotower.towers.errors import InvalidRequestError


def file_of(path: Path, data: bytes) -> InputFile:
    path.write_bytes(data)
    (file,) = find_inputs([str(path)])
    return file


def codes(file: InputFile) -> list[Any]:
    """Of each record its value, or the code of its fault."""
    found: list[Any] = []
    for _, line in read_records(file):
        fault = read_fault(line)
        found.append(json.loads(line) if fault is None else fault[0])
    return found


def test_blank_lines_are_no_records_and_count(tmp_path: Path) -> None:
    data = b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{bad\n"\xff"'
    lines = list(read_records(file_of(tmp_path / "a.jsonl", data)))
    assert lines == [(0, '{"a": 1}'), (3, "{bad"), (4, '"\ufffd"')]


@pytest.mark.parametrize(
    ("suffix", "compress"), [("gz", gzip.compress), ("bz2", bz2.compress), ("GZ", gzip.compress)]
)
def test_compressed_files(tmp_path: Path, suffix: str, compress: Any) -> None:
    data = compress(b"1\n2") + compress(b"3\n\n4\n")
    seen = bytearray()
    file = file_of(tmp_path / f"a.jsonl.{suffix}", data)
    lines = list(read_records(file, on_bytes=seen.extend))
    assert lines == [(0, "1"), (1, "23"), (3, "4")]
    assert seen == data


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz"])
def test_a_cut_file_is_named(tmp_path: Path, name: str) -> None:
    data = gzip.compress(os.urandom(200_000).hex().encode() + b"\n1")
    file = file_of(tmp_path / name, data[: len(data) // 2])
    with pytest.raises(InvalidRequestError, match=f"{name}.*read to its end"):
        list(read_records(file))


def test_a_line_of_any_length_takes_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(records, "_CHUNK_BYTES", 300)
    data = b"1" * 1000 + b"\n" + b"2" * 1001 + b"\n3\n" + b"4" * 5_000_000
    file = file_of(tmp_path / "a.jsonl", data)
    tracemalloc.start()
    found = list(read_records(file))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [index for index, _ in found] == [0, 1, 2, 3]
    assert [read_fault(line) is None for _, line in found] == [True, False, True, False]
    assert peak < 200_000


def test_csv_with_quotes_and_newlines(tmp_path: Path) -> None:
    data = b'\xef\xbb\xbfid,prompt\r\n007,"say ""hi"",\nthen go"\r\n\r\n8,\xff\n9,'
    file = file_of(tmp_path / "a.csv", data)
    assert list(read_records(file)) == [
        (0, '{"id": "007", "prompt": "say \\"hi\\",\\nthen go"}'),
        (2, '{"id": "8", "prompt": "\ufffd"}'),
        (3, '{"id": "9", "prompt": ""}'),
    ]


def test_a_bad_row_of_csv_costs_itself_alone(tmp_path: Path) -> None:
    data = b'a,b\n1,2,3\n4\n"x"y,5\n6,7\n"never closed,8\n9,10\n11,"12"\n"at the end,13\n14,15\n'
    assert codes(file_of(tmp_path / "a.csv", data)) == [
        "bad_csv",
        "bad_csv",
        "bad_csv",
        {"a": "6", "b": "7"},
        "bad_csv",
        {"a": "9", "b": "10"},
        {"a": "11", "b": "12"},
        "bad_csv",
        {"a": "14", "b": "15"},
    ]


def test_a_long_row_of_csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 1000)
    field = b"z" * 900
    data = b"a\n" + field + b"\n" + b"y" * 2000 + b'\n"' + b"\n" * 1000 + b'"\n' + field
    found = codes(file_of(tmp_path / "a.csv", data))
    assert found[:2] == [{"a": field.decode()}, "bad_csv"]
    assert found[-1] == {"a": field.decode()}


def test_a_field_longer_than_the_csv_modules_own_limit(tmp_path: Path) -> None:
    field = "z" * 300_000
    assert codes(file_of(tmp_path / "a.csv", f"a\n{field}\n".encode())) == [{"a": field}]


@pytest.mark.parametrize("header", [b"a,a\n1,2", b'"a\n1,2', b'"a"b\n1'])
def test_a_header_that_names_no_columns(tmp_path: Path, header: bytes) -> None:
    file = file_of(tmp_path / "a.csv", header)
    with pytest.raises(InvalidRequestError, match=r"a\.csv.*names its columns"):
        list(read_records(file))


@pytest.mark.parametrize("data", [b"", b"\n\n", b"a,b\n"])
def test_csv_without_records(tmp_path: Path, data: bytes) -> None:
    assert codes(file_of(tmp_path / "a.csv", data)) == []


def write_parquet(path: Path, columns: dict[str, Any]) -> InputFile:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=70)
    (file,) = find_inputs([str(path)])
    return file


def test_parquet_with_nested_columns(tmp_path: Path) -> None:
    columns = {
        "prompt": ["a", None],
        "nested": [{"x": [1, 2], "y": {"z": "ä"}}, None],
        "value": [1.5, float("nan")],
        "raw": [b"\x00", b"\xff"],
    }
    file = write_parquet(tmp_path / "a.parquet", columns)
    assert codes(file) == [
        {"prompt": "a", "nested": {"x": [1, 2], "y": {"z": "ä"}}, "value": 1.5, "raw": "\x00"},
        {"prompt": None, "nested": None, "value": None, "raw": "\ufffd"},
    ]


def test_chosen_columns_of_parquet(tmp_path: Path) -> None:
    columns = {"id": list(range(200)), "prompt": ["p"] * 200}
    file = write_parquet(tmp_path / "a.parquet", columns)
    seen = bytearray()
    lines = list(read_records(file, columns=["custom_id", "id"], on_bytes=seen.extend))
    assert lines == [(index, f'{{"id": {index}}}') for index in range(200)]
    assert seen == (tmp_path / "a.parquet").read_bytes()
    assert len(list(read_records(file, columns=["none"]))) == 200


def test_what_python_has_no_value_for_is_the_rows_fault(tmp_path: Path) -> None:
    days = pyarrow.array([1, 10**7, 2], pyarrow.int32()).cast(pyarrow.date32())
    file = write_parquet(tmp_path / "a.parquet", {"a.b": ["x", "y", "z"], "day": days})
    assert codes(file) == [
        {"a.b": "x", "day": "1970-01-02"},
        "bad_parquet",
        {"a.b": "z", "day": "1970-01-03"},
    ]


def test_text_of_parquet_that_is_none_is_the_rows_fault(tmp_path: Path) -> None:
    text = pyarrow.array([b"fine", b"\xff"]).view(pyarrow.string())
    file = write_parquet(tmp_path / "a.parquet", {"prompt": text})
    assert codes(file) == [{"prompt": "fine"}, "bad_parquet"]


def test_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    twice = pyarrow.table([["x"], ["y"]], names=["prompt", "prompt"])
    pyarrow.parquet.write_table(twice, tmp_path / "a.parquet")
    (file,) = find_inputs([str(tmp_path)])
    with pytest.raises(InvalidRequestError, match=r"a\.parquet.*a name of its own"):
        list(read_records(file))


@pytest.mark.parametrize("keep", [0, 3, 100, -1, -8])
def test_cut_parquet_is_named(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, {"prompt": ["p"] * 200})
    file = file_of(path, path.read_bytes()[:keep])
    with pytest.raises(InvalidRequestError, match=r"a\.parquet.*read to its end"):
        list(read_records(file))


def test_parquet_with_a_broken_page_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, {"prompt": [str(index) for index in range(200)]})
    data = bytearray(path.read_bytes())
    data[4:60] = b"\xff" * 56
    with pytest.raises(InvalidRequestError, match=r"a\.parquet.*read to its end"):
        list(read_records(file_of(path, bytes(data))))


def outcome(line: str) -> BatchRequest | RowError:
    try:
        return parse_request(0, line, BatchDefaults())
    except RowError as error:
        return error


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=60)
    | st.lists(st.sampled_from([b'{"prompt":"a"}', b"\n", b'"'])).map(b"".join)
)
@example(b'{"prompt": "\\ud800"}\n\n\x00\n\n{"prompt": 1e400}')
def test_any_bytes_as_json_lines(tmp_path: Path, data: bytes) -> None:
    found = list(read_records(file_of(tmp_path / "a.jsonl", data)))
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    not_blank = [n for n, line in enumerate(lines) if line.decode(errors="replace").strip()]
    assert [index for index, _ in found] == not_blank
    for _, line in found:
        outcome(line)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60) | st.text('a,"\n\r', max_size=60).map(str.encode))
@example(b'a\n"\n"\n"x')
def test_any_bytes_as_csv(tmp_path: Path, data: bytes) -> None:
    file = file_of(tmp_path / "a.csv", b"prompt\n" + data)
    found = list(read_records(file))
    indices = [index for index, _ in found]
    assert indices == sorted(set(indices))
    for _, line in found:
        outcome(line)
