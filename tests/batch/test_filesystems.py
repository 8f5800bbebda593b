"""Paths and URLs as filesystems."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pyarrow.fs
import pytest

from twotower.batch.filesystems import fsspec_of, join_path, open_filesystem
from twotower.towers.errors import InvalidRequestError


def test_a_path_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/of")
    filesystem, path = open_filesystem("a/../b c#?.jsonl")
    assert isinstance(filesystem, pyarrow.fs.LocalFileSystem)
    assert path == f"{tmp_path}/b c#?.jsonl"
    assert open_filesystem("~/x")[1] == "/home/of/x"


@pytest.mark.parametrize("name", ["plain.jsonl", "with blank.jsonl"])
def test_a_url_of_a_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"found")
    filesystem, path = open_filesystem(f"file://{tmp_path}/{name}")
    with filesystem.open_input_stream(path) as file:
        assert file.read() == b"found"


def test_a_filesystem_that_pyarrow_lacks() -> None:
    filesystem, path = open_filesystem("memory://bucket/x")
    with filesystem.open_output_stream(path) as file:
        file.write(b"kept")
    memory = fsspec.filesystem("memory")
    assert memory.cat("/bucket/x") == b"kept"
    assert fsspec_of(filesystem) is memory
    memory.rm("/bucket", recursive=True)


def test_globs_of_a_filesystem_of_pyarrow(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.csv").touch()
    found = fsspec_of(pyarrow.fs.LocalFileSystem()).glob(f"{tmp_path}/*/*.csv")
    assert found == [f"{tmp_path}/a/b.csv"]


def test_what_cannot_be_opened_is_named() -> None:
    with pytest.raises(InvalidRequestError) as refused:
        open_filesystem("nope://x", "output")
    assert (refused.value.field, refused.value.value) == ("output", "nope://x")
    assert "Protocol not known: nope" in str(refused.value)


def test_files_of_a_folder() -> None:
    assert join_path("a/b/", "c") == join_path("a/b", "c") == "a/b/c"
