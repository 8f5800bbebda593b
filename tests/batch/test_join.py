"""One output of many parts: each committed row once, whatever else lies there."""

from __future__ import annotations

import gzip
import json
from itertools import groupby
from pathlib import Path

import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.batch_rows import JobFolders, good_row
from twotower.batch import join as join_module
from twotower.batch import part_chunks
from twotower.batch.join import JoinSummary, errors_path, join_parts
from twotower.batch.output_lines import row_of_error
from twotower.batch.sink import PARQUET_SCHEMA, Format
from twotower.towers.errors import InvalidRequestError


def rows_of(output: Path) -> list[int]:
    if output.suffix == ".parquet":
        return list(pyarrow.parquet.read_table(output)["row"].to_pylist())
    return [row_of_error(line) for line in output.read_bytes().splitlines()]


def test_the_order_of_the_input(tmp_path: Path) -> None:
    folders = JobFolders(tmp_path)
    folders.commit(0, good=[5, 7, 20], bad=[6])
    folders.commit(1, good=[0, 8, 9], bad=[30])
    folders.commit(2, good=[], bad=[3])
    output = tmp_path / "out" / "all.jsonl"
    summary = join_parts(*folders.paths, str(output), ordered=True)
    errors = tmp_path / "out" / "all.errors.jsonl"
    assert summary == JoinSummary(rows=6, errors=3, errors_path=str(errors))
    assert rows_of(output) == [0, 5, 7, 8, 9, 20]
    assert rows_of(errors) == [3, 6, 30]
    assert [path.name for path in sorted(output.parent.iterdir())] == [errors.name, output.name]


def test_without_order_parts_follow_each_other(tmp_path: Path) -> None:
    folders = JobFolders(tmp_path)
    folders.commit(0, good=[5, 20])
    folders.commit(1, good=[0, 8])
    output = tmp_path / "all.jsonl"
    assert join_parts(*folders.paths, str(output)).errors_path is None
    assert rows_of(output) == [0, 8, 5, 20]


def test_lines_are_those_of_the_parts(tmp_path: Path) -> None:
    folders = JobFolders(tmp_path)
    record = {"prompt": "line\u2028 and\r\n" + "x" * 200_000, "x": None}
    part = folders.write(0, [good_row(3, record), good_row(4)])
    folders.checkpoint(part, [4, 3])
    output = tmp_path / "all.jsonl"
    join_parts(*folders.paths, str(output), ordered=True)
    assert output.read_bytes() == (folders.parts / f"{part}.jsonl").read_bytes()


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(join_module, "_GROUP_BYTES", 2000)
    folders = JobFolders(tmp_path, "parquet")
    folders.commit(0, good=range(0, 600, 3), bad=[10_000])
    folders.commit(1, good=range(1, 600, 3))
    folders.commit(2, good=range(2, 600, 3))
    output = tmp_path / "all.parquet"
    summary = join_parts(*folders.paths, str(output), ordered=True, format="parquet")
    assert (summary.rows, summary.errors) == (600, 1)
    assert rows_of(output) == list(range(600))
    assert rows_of(tmp_path / "all.errors.jsonl") == [10_000]
    assert pyarrow.parquet.read_schema(output) == PARQUET_SCHEMA


def test_a_compressed_output(tmp_path: Path) -> None:
    folders = JobFolders(tmp_path)
    folders.commit(0, good=[1], bad=[2])
    join_parts(*folders.paths, str(tmp_path / "all.jsonl.gz"))
    (line,) = gzip.decompress((tmp_path / "all.jsonl.gz").read_bytes()).splitlines()
    assert json.loads(line)["custom_id"] == "id-1"
    assert rows_of(tmp_path / "all.errors.jsonl") == [2]


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_no_good_rows(tmp_path: Path, format: Format) -> None:
    folders = JobFolders(tmp_path, format)
    folders.commit(0, good=[], bad=[2])
    output = tmp_path / f"all.{format}"
    assert join_parts(*folders.paths, str(output), ordered=True, format=format).rows == 0
    assert rows_of(output) == []


def test_what_is_not_committed_does_not_count(tmp_path: Path) -> None:
    folders = JobFolders(tmp_path)
    folders.commit(0, good=[1])
    folders.write(1, [good_row(2)])
    begun = folders.write(2, [good_row(3)])
    folders.checkpoint(begun, [3], pending=True)
    output = tmp_path / "all.jsonl"
    join_parts(*folders.paths, str(output))
    assert rows_of(output) == [1]


def test_old_outputs_are_replaced(tmp_path: Path) -> None:
    folders = JobFolders(tmp_path)
    folders.commit(0, good=[1])
    output, errors = tmp_path / "all.jsonl", tmp_path / "all.errors.jsonl"
    output.write_text("old")
    errors.write_text("old")
    join_parts(*folders.paths, str(output))
    assert rows_of(output) == [1]
    assert not errors.exists()


@pytest.mark.parametrize("damage", ["twice", "fewer", "more", "cut", "missing"])
def test_damage_is_noticed_and_leaves_the_old_output(tmp_path: Path, damage: str) -> None:
    folders = JobFolders(tmp_path)
    part = folders.commit(0, good=[1, 2])
    path = folders.parts / f"{part}.jsonl"
    data = path.read_bytes()
    if damage == "twice":
        folders.commit(1, good=[2])
    elif damage == "missing":
        path.unlink()
    else:
        cut = data[: data.index(b"\n") + 1]
        path.write_bytes({"fewer": cut, "more": data + cut, "cut": data[:-9]}[damage])
    output = tmp_path / "all.jsonl"
    output.write_text("old")
    with pytest.raises(InvalidRequestError):
        join_parts(*folders.paths, str(output), ordered=True)
    assert output.read_text() == "old"
    assert not list(tmp_path.glob(".partial*"))


def test_thousands_of_parts_are_not_all_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = pytest.importorskip("resource")
    folders = JobFolders(tmp_path)
    for part in range(120):
        folders.commit(part, good=range(part, 360, 120))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 20, hard))
    monkeypatch.setattr(part_chunks, "_PIECE_BYTES", 100)
    try:
        join_parts(*folders.paths, str(tmp_path / "all.jsonl"), ordered=True)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert rows_of(tmp_path / "all.jsonl") == list(range(360))


@settings(
    deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.dictionaries(st.integers(0, 60), st.tuples(st.integers(0, 4), st.booleans())))
def test_any_division_into_parts(
    tmp_path_factory: pytest.TempPathFactory, places: dict[int, tuple[int, bool]]
) -> None:
    folder = tmp_path_factory.mktemp("job")
    folders = JobFolders(folder)
    by_part = sorted(places.items(), key=lambda item: item[1][0])
    for part, items in groupby(by_part, key=lambda item: item[1][0]):
        rows = list(items)
        good = [row for row, (_, fine) in rows if fine]
        folders.commit(part, good, [row for row, (_, fine) in rows if not fine])
    join_parts(*folders.paths, str(folder / "all.jsonl"), ordered=True)
    assert rows_of(folder / "all.jsonl") == sorted(row for row in places if places[row][1])
    failed = sorted(row for row in places if not places[row][1])
    errors = folder / "all.errors.jsonl"
    assert (rows_of(errors) if failed else errors.exists()) == (failed or False)


@pytest.mark.parametrize(
    ("output", "beside"),
    [
        ("a/out.jsonl", "a/out.errors.jsonl"),
        ("out.parquet", "out.errors.jsonl"),
        ("s3://b/x.y.jsonl.gz", "s3://b/x.y.errors.jsonl"),
        ("out", "out.errors.jsonl"),
    ],
)
def test_the_place_of_errors(output: str, beside: str) -> None:
    assert errors_path(output) == beside
