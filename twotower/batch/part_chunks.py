"""Rows of a committed part, a piece at a time: of a file at most one piece is in memory, and no
file stays open between two pieces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import pyarrow
import pyarrow.parquet

from twotower.batch.output_lines import row_of_error
from twotower.batch.parts import PartFolder
from twotower.batch.sink import ERRORS_SUFFIX, Format
from twotower.towers.errors import InvalidRequestError

_PIECE_BYTES = 64 << 10


@dataclass(frozen=True)
class Chunk:
    """Rows that follow each other in a part: their numbers, ascending, and what is to be written of
    them, `data[i:j]` for rows i to j: a list of lines or a table."""

    rows: numpy.ndarray
    data: Any


@dataclass(frozen=True)
class CommittedPart:
    """A part of `folder` and the rows of it that are done, ascending."""

    folder: PartFolder
    name: str
    rows: numpy.ndarray
    has_errors: bool

    def good_chunks(self, format: Format) -> Iterator[Chunk]:
        """The good rows. Raises InvalidRequestError if the file has more or fewer of them."""
        expected = numpy.setdiff1d(self.rows, self.error_rows(), assume_unique=True)
        if not expected.size:
            return
        path = self.folder.path(f"{self.name}.{format}")
        chunks = self._tables(path) if format == "parquet" else self._lines(path, expected)
        done = 0
        for chunk in chunks:
            here = expected[done : done + len(chunk.data)]
            if here.size != len(chunk.data) or not numpy.array_equal(here, chunk.rows):
                raise _damaged(path, expected.size)
            done += here.size
            yield chunk
        if done != expected.size:
            raise _damaged(path, expected.size)

    def error_chunks(self) -> Iterator[Chunk]:
        """The rows that ended as errors."""
        if not self.has_errors:
            return
        for lines in self._pieces(self.folder.path(f"{self.name}{ERRORS_SUFFIX}")):
            rows = numpy.array([row_of_error(line) for line in lines], dtype=numpy.int64)
            # The others are to be done again, see `recovery.retry_rows`.
            done = numpy.isin(rows, self.rows)
            if done.any():
                yield Chunk(rows[done], [lines[index] for index in numpy.flatnonzero(done)])

    def error_rows(self) -> numpy.ndarray:
        """Numbers of the rows that ended as errors, ascending."""
        chunks = [chunk.rows for chunk in self.error_chunks()]
        return numpy.concatenate(chunks) if chunks else self.rows[:0]

    def _tables(self, path: str) -> Iterator[Chunk]:
        with self.folder.open_file(path) as file:
            count = pyarrow.parquet.ParquetFile(file).num_row_groups
        for group in range(count):
            with self.folder.open_file(path) as file:
                table = pyarrow.parquet.ParquetFile(file).read_row_group(group)
            yield Chunk(table["row"].to_numpy(), table)

    def _lines(self, path: str, expected: numpy.ndarray) -> Iterator[Chunk]:
        """Lines do not say their rows: they are the good ones, in order."""
        done = 0
        for lines in self._pieces(path):
            yield Chunk(expected[done : done + len(lines)], lines)
            done += len(lines)

    def _pieces(self, path: str) -> Iterator[list[bytes]]:
        """Whole lines without their ends."""
        offset, rest = 0, b""
        while piece := self._read(path, offset):
            offset += len(piece)
            *lines, rest = (rest + piece).split(b"\n")
            if lines:
                yield lines
        if rest:
            raise InvalidRequestError("output", path, "a file whose last line is complete")

    def _read(self, path: str, offset: int) -> bytes:
        with self.folder.open_file(path) as file:
            file.seek(offset)
            return bytes(file.read(_PIECE_BYTES))


def _damaged(path: str, expected: int) -> InvalidRequestError:
    limit = f"a file with the {expected} good rows that its checkpoint names"
    return InvalidRequestError("output", path, limit)
