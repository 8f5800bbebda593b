"""What a user may name as input."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from twotower.batch.inputs import find_inputs, kind_of
from twotower.batch.records import read_records
from twotower.towers.errors import InvalidRequestError


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name in ("b.jsonl", "a.csv", "c.ndjson.gz", "d.parquet", "x.txt", ".h.jsonl", "_i.csv"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "e.json").write_bytes(b"1234")
    return tmp_path


@pytest.fixture
def memory() -> Iterator[str]:
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe({"/job/b.jsonl": b"{}", "/job/a.jsonl": b"{}\n{}", "/job/c.txt": b"x"})
    yield "memory://job"
    filesystem.rm("/job", recursive=True)


def names(*inputs: str) -> list[str]:
    return [file.name for file in find_inputs(inputs)]


def test_a_file(data: Path) -> None:
    (file,) = find_inputs([str(data / "below" / "e.json")])
    assert (file.name, file.kind, file.size) == ("e.json", "jsonl", 4)


def test_a_folder_stands_for_its_files(data: Path) -> None:
    assert names(str(data)) == ["a.csv", "b.jsonl", "c.ndjson.gz", "d.parquet"]
    assert names(data.as_uri()) == ["a.csv", "b.jsonl", "c.ndjson.gz", "d.parquet"]


def test_globs(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert names(f"{data}/[ab].*") == ["a.csv", "b.jsonl"]
    assert names(f"{data}/**/*.json") == ["e.json"]
    assert names(f"{data}/*") == ["a.csv", "b.jsonl", "c.ndjson.gz", "d.parquet"]
    assert names(f"{data.as_uri()}/?.csv") == ["a.csv"]
    monkeypatch.chdir(data)
    assert names("*.csv") == ["a.csv"]
    assert names("bel*/*.json") == ["e.json"]


def test_a_name_with_a_wildcards_characters(data: Path) -> None:
    (data / "b[1].jsonl").write_bytes(b"")
    assert names(f"{data}/b[1].jsonl") == ["b[1].jsonl"]


def test_several_are_in_order_and_each_file_once(data: Path) -> None:
    inputs = (f"{data}/d.parquet", str(data), f"{data}/below/../a.csv")
    assert names(*inputs) == ["d.parquet", "a.csv", "b.jsonl", "c.ndjson.gz"]


def test_a_filesystem_of_fsspec(memory: str) -> None:
    assert names(memory) == ["a.jsonl", "b.jsonl"]
    assert names(f"{memory}/b.jsonl", f"{memory}/*.jsonl") == ["b.jsonl", "a.jsonl"]
    (file, _) = find_inputs([memory])
    assert list(read_records(file)) == [(0, "{}"), (1, "{}")]


def test_stdin_is_kept(tmp_path: Path) -> None:
    (file,) = find_inputs(["-"], scratch=tmp_path / "new", stdin=io.BytesIO(b'{"a": 1}\n[2]'))
    assert list(read_records(file)) == [(0, '{"a": 1}'), (1, "[2]")]
    assert Path(file.path).parent == tmp_path / "new"
    assert len(list((tmp_path / "new").iterdir())) == 1


@pytest.mark.parametrize(
    ("named", "reason"),
    [
        ("nothing.jsonl", "a file, folder or glob that exists"),
        ("*.none", "at least one file of a known kind"),
        ("x.txt", "a file of a known kind"),
        ("empty", "at least one file of a known kind"),
    ],
)
def test_what_is_refused(
    data: Path, named: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (data / "empty").mkdir()
    monkeypatch.chdir(data)
    with pytest.raises(InvalidRequestError, match=f"input: got .*expected {reason}") as refused:
        find_inputs([named])
    assert refused.value.value == named


@pytest.mark.parametrize("named", ["nope://x/y.jsonl", "nope://x/*.jsonl", "file://x"])
def test_urls_that_cannot_be_opened(named: str) -> None:
    with pytest.raises(InvalidRequestError, match="input"):
        find_inputs([named])


def test_no_input_and_stdin_without_a_place() -> None:
    with pytest.raises(InvalidRequestError, match="at least one"):
        find_inputs([])
    with pytest.raises(InvalidRequestError, match="no folder to keep stdin"):
        find_inputs(["-"])


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("a/b.JSONL", "jsonl"),
        ("b.csv.zst", "csv"),
        ("b.parquet", "parquet"),
        ("b.parquet.gz", None),
        ("b.gz", None),
        ("jsonl", None),
    ],
)
def test_kinds(path: str, kind: str | None) -> None:
    assert kind_of(path) == kind
