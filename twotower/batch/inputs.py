"""What a user names as the input of a job, as a list of files."""

from __future__ import annotations

import posixpath
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import pyarrow.fs

from twotower.batch.filesystems import fsspec_of, join_path, open_filesystem
from twotower.towers.errors import InvalidRequestError

Kind = Literal["jsonl", "csv", "parquet"]

FIELD = "input"
_KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
}
_COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}
_KNOWN = f"{', '.join(_KINDS)}; all but the last also with {', '.join(_COMPRESSED)}"
_MAGIC = "*?["


@dataclass(frozen=True)
class InputFile:
    """A file of the input: its path in `filesystem`, how to read it, and its size in bytes."""

    filesystem: pyarrow.fs.FileSystem
    path: str
    kind: Kind
    size: int

    @property
    def name(self) -> str:
        """The file's name without its folders, as errors of its rows say it."""
        return posixpath.basename(self.path)

    @property
    def compression(self) -> str | None:
        """What pyarrow calls the file's compression as a whole, None if it has none."""
        return _COMPRESSED.get(posixpath.splitext(self.path)[1].lower())


def find_inputs(
    inputs: Sequence[str], *, scratch: Path | None = None, stdin: BinaryIO | None = None
) -> tuple[InputFile, ...]:
    """The files that `inputs` name, in order: files, folders, globs, URLs, or `-` for stdin.

    A folder stands for the files in it (not in folders below) whose kind is known and whose name
    does not begin with a dot or an underscore, a glob for the files of known kinds that it matches;
    both sorted. A file that is named twice is read once. `-` is read as JSON lines to its end and
    kept in `scratch`.
    Kinds, by suffix: JSON lines (.jsonl, .ndjson, .json) and CSV (.csv), both also compressed
    (.gz, .bz2, .zst, .lz4), and Parquet (.parquet).

    Raises InvalidRequestError for what does not exist, is of no known kind, or leaves no file.
    """
    if not inputs:
        raise InvalidRequestError(FIELD, list(inputs), "at least one file, folder, glob or -")
    found: dict[tuple[str, str], InputFile] = {}
    for named in dict.fromkeys(inputs):
        if named == "-":
            named = str(_spool(scratch, stdin))
        for file in _files_of(named):
            found.setdefault((file.filesystem.type_name, file.path), file)
    return tuple(found.values())


def kind_of(path: str) -> Kind | None:
    """The kind of a file by its suffix, None if it is of none that is known."""
    name = posixpath.basename(path).lower()
    plain = uncompressed_name(name)
    kind = _KINDS.get(posixpath.splitext(plain)[1])
    return None if kind == "parquet" and plain != name else kind


def uncompressed_name(name: str) -> str:
    """A file's name without the ending of a compressed file, if it has one."""
    return next((name.removesuffix(end) for end in _COMPRESSED if name.endswith(end)), name)


def _spool(scratch: Path | None, stdin: BinaryIO | None) -> Path:
    if scratch is None:
        raise InvalidRequestError(FIELD, "-", "a file, where there is no folder to keep stdin in")
    scratch.mkdir(parents=True, exist_ok=True)
    whole, partial = scratch / "stdin.jsonl", scratch / "stdin.partial"
    with partial.open("wb") as copy:
        shutil.copyfileobj(sys.stdin.buffer if stdin is None else stdin, copy)
    partial.replace(whole)
    return whole


def _files_of(named: str) -> list[InputFile]:
    filesystem, path, info = _look_up(named)
    if info.type == pyarrow.fs.FileType.File:
        kind = kind_of(path)
        if kind is None:
            raise InvalidRequestError(FIELD, named, f"a file of a known kind ({_KNOWN})")
        return [InputFile(filesystem, path, kind, info.size)]
    if info.type == pyarrow.fs.FileType.Directory:
        infos: Iterable[pyarrow.fs.FileInfo] = filesystem.get_file_info(
            pyarrow.fs.FileSelector(path)
        )
        files = list(_known(filesystem, infos))
    elif _has_magic(named):
        files = _matches(named)
    else:
        raise InvalidRequestError(FIELD, named, "a file, folder or glob that exists")
    if not files:
        raise InvalidRequestError(FIELD, named, f"at least one file of a known kind ({_KNOWN})")
    return files


def _look_up(named: str) -> tuple[pyarrow.fs.FileSystem, str, pyarrow.fs.FileInfo]:
    # A file may be called `data[1].jsonl`; a `?` of a glob would be the query of a URL.
    literal = not ("://" in named and _has_magic(named))
    filesystem, path = open_filesystem(named if literal else _split_glob(named)[0], FIELD)
    try:
        info = filesystem.get_file_info(path)
    except (OSError, ValueError) as error:
        raise InvalidRequestError(FIELD, named, f"a path that can be read ({error})") from error
    if not literal:
        info = pyarrow.fs.FileInfo(path, pyarrow.fs.FileType.NotFound)
    return filesystem, path, info


def _matches(named: str) -> list[InputFile]:
    folder, pattern = _split_glob(named)
    filesystem, path = open_filesystem(folder, FIELD)
    paths = [str(match) for match in fsspec_of(filesystem).glob(join_path(path, pattern))]
    return list(_known(filesystem, filesystem.get_file_info(paths)))


def _known(
    filesystem: pyarrow.fs.FileSystem, infos: Iterable[pyarrow.fs.FileInfo]
) -> Iterator[InputFile]:
    """Those that are files to be read, sorted by path."""
    for info in sorted(infos, key=lambda info: str(info.path)):
        kind = kind_of(info.path)
        hidden = posixpath.basename(info.path).startswith((".", "_"))
        if info.type == pyarrow.fs.FileType.File and kind is not None and not hidden:
            yield InputFile(filesystem, info.path, kind, info.size)


def _has_magic(named: str) -> bool:
    return any(character in named for character in _MAGIC)


def _split_glob(named: str) -> tuple[str, str]:
    """The folder before the first part with a wildcard, and the rest."""
    first = min(named.index(character) for character in _MAGIC if character in named)
    cut = named.rfind("/", 0, first) + 1
    return named[:cut] or ".", named[cut:]
