"""One output file of the committed parts of a job."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush
from typing import Any

import numpy
import pyarrow
import pyarrow.fs
import pyarrow.parquet

from twotower.batch.filesystems import join_path, open_filesystem
from twotower.batch.inputs import uncompressed_name
from twotower.batch.part_chunks import Chunk, CommittedPart
from twotower.batch.parts import PartFolder, repeated_rows
from twotower.batch.sink import ERRORS_SUFFIX, PARQUET_SCHEMA, Format
from twotower.towers.errors import InvalidRequestError

_GROUP_BYTES = 16 << 20
_Source = tuple[int, Callable[[], Iterator[Chunk]]]


@dataclass(frozen=True)
class JoinSummary:
    """Rows of the output and of the file of errors beside it, and the path of that, if any."""

    rows: int
    errors: int
    errors_path: str | None


def join_parts(
    folder: str, checkpoints: str, output: str, *, ordered: bool = False, format: Format = "jsonl"
) -> JoinSummary:
    """Joins the parts in `folder` that `checkpoints` (the folder of Ray Data's) name as committed.

    `output` and, if rows ended as errors, the file beside it (`out.jsonl`: `out.errors.jsonl`) are
    replaced as a whole when they are complete. `ordered` puts rows in the order of the input; else
    parts follow each other. Any path may be a URL. Memory: 16 bytes a row, and 64 KiB, or a group
    of rows of Parquet, for each of the parts that overlap at one place.

    Raises InvalidRequestError if a row is in two parts, or a part lacks rows of its checkpoint.
    """
    parts = _committed(PartFolder(folder, checkpoints))
    order = _merged if ordered else _one_by_one
    good = order([(part.rows[0], partial(part.good_chunks, format)) for part in parts])
    failed = order([(part.rows[0], part.error_chunks) for part in parts if part.has_errors])
    beside = errors_path(output)
    with ExitStack() as files:
        # They are replaced in the reverse order of this.
        whole = files.enter_context(_Replaced(output))
        errors_file = files.enter_context(_Replaced(beside, or_deleted=True))
        write = _write_parquet if format == "parquet" else _write_lines
        rows = write(good, whole)
        errors = _write_lines(failed, errors_file)
    return JoinSummary(rows, errors, beside if errors else None)


def count_rows(folder: str, checkpoints: str) -> tuple[int, int]:
    """Good rows and errors of the committed parts."""
    parts = _committed(PartFolder(folder, checkpoints))
    rows = sum(part.rows.size for part in parts)
    errors = sum(part.error_rows().size for part in parts if part.has_errors)
    return int(rows - errors), int(errors)


def errors_path(output: str) -> str:
    """The path of the file of errors beside an output file."""
    folder, name = posixpath.split(output)
    plain = posixpath.splitext(uncompressed_name(name))[0]
    return posixpath.join(folder, plain + ERRORS_SUFFIX)


def _committed(folder: PartFolder) -> list[CommittedPart]:
    """Committed parts in order of their first rows."""
    files = folder.files()
    found = [
        CommittedPart(folder, name, folder.rows(name), f"{name}{ERRORS_SUFFIX}" in files)
        for name in folder.committed()
    ]
    parts = sorted((part for part in found if part.rows.size), key=lambda part: int(part.rows[0]))
    twice = repeated_rows([part.rows for part in parts])
    if twice.size:
        raise InvalidRequestError("output", int(twice[0]), "a row in one committed part alone")
    return parts


def _one_by_one(sources: Iterable[_Source]) -> Iterator[Chunk]:
    for _, chunks in sources:
        yield from chunks()


def _merged(sources: Iterable[_Source]) -> Iterator[Chunk]:
    """Chunks in the order of rows. A source is begun when its first row may be next."""
    # Next row (at least), the source's index, and its chunk and the rest, once it is begun.
    heap: list[tuple[int, int, Chunk | None, Iterator[Chunk] | None]] = []
    opened = [chunks for _, chunks in sources]
    for index, (first, _) in enumerate(sources):
        heappush(heap, (int(first), index, None, None))
    while heap:
        _, index, chunk, rest = heappop(heap)
        if rest is None:
            rest = opened[index]()
        elif chunk is not None:
            end = int(numpy.searchsorted(chunk.rows, heap[0][0])) if heap else len(chunk.rows)
            yield Chunk(chunk.rows[:end], chunk.data[:end])
            chunk = Chunk(chunk.rows[end:], chunk.data[end:])
        if chunk is None or not len(chunk.rows):
            chunk = next(rest, None)
        if chunk is not None:
            heappush(heap, (int(chunk.rows[0]), index, chunk, rest))


def _write_lines(chunks: Iterable[Chunk], file: _Replaced) -> int:
    rows = 0
    for chunk in chunks:
        file.stream().write(b"".join(line + b"\n" for line in chunk.data))
        rows += len(chunk.data)
    return rows


def _write_parquet(chunks: Iterable[Chunk], file: _Replaced) -> int:
    rows = size = 0
    waiting: list[pyarrow.Table] = []
    with pyarrow.parquet.ParquetWriter(file.stream(), PARQUET_SCHEMA) as writer:
        for chunk in chunks:
            waiting.append(chunk.data)
            rows += chunk.data.num_rows
            size += chunk.data.nbytes
            if size >= _GROUP_BYTES:
                writer.write_table(pyarrow.concat_tables(waiting))
                waiting, size = [], 0
        if waiting:
            writer.write_table(pyarrow.concat_tables(waiting))
    return rows


class _Replaced:
    """A file that is written aside and takes its name's place when it is complete.

    If nothing was written it is empty, or with `or_deleted` there is none.
    """

    def __init__(self, url: str, *, or_deleted: bool = False) -> None:
        self._filesystem, self._path = open_filesystem(url, "output")
        folder, name = posixpath.split(self._path)
        self._folder = folder
        # With the name's end, by which pyarrow compresses.
        self._aside = join_path(folder, f".partial-{name}")
        self._or_deleted = or_deleted
        self._stream: Any = None

    def stream(self) -> Any:
        if self._stream is None:
            if isinstance(self._filesystem, pyarrow.fs.LocalFileSystem):
                self._filesystem.create_dir(self._folder, recursive=True)
            self._stream = self._filesystem.open_output_stream(self._aside)
        return self._stream

    def __enter__(self) -> _Replaced:
        if not self._or_deleted:
            self.stream()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._stream is not None:
            self._stream.close()
            if kind is None:
                self._filesystem.move(self._aside, self._path)
            else:
                self._filesystem.delete_file(self._aside)
        elif kind is None and self._exists():
            self._filesystem.delete_file(self._path)

    def _exists(self) -> bool:
        info = self._filesystem.get_file_info(self._path)
        return bool(info.type == pyarrow.fs.FileType.File)
