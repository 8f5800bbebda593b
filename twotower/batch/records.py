"""Records of an input file, one after the other, in bounded memory.

Each record comes with its index in the file, as a line of JSON or as a fault (`lines.fault_line`).
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow
import pyarrow.parquet

from twotower.batch.inputs import FIELD, InputFile
from twotower.batch.lines import MAX_LINE_BYTES, dump_json, fault_line
from twotower.towers.errors import InvalidRequestError, cut_off

_CHUNK_BYTES = 1 << 20
# Rows of Parquet that are decoded at once.
_BATCH_ROWS = 64
# Dates after the year 9999, text that is not UTF-8, unknown zones of time.
_NOT_PYTHONS = (ArithmeticError, LookupError, TypeError, ValueError)
# What a line in memory takes beside its bytes, for rows of CSV that have many.
_LINE_OVERHEAD = 64
_BOM = b"\xef\xbb\xbf"
_TOO_LONG = f"the line is longer than {MAX_LINE_BYTES} bytes"


def read_records(
    file: InputFile,
    *,
    on_bytes: Callable[[bytes], None] | None = None,
    columns: Sequence[str] | None = None,
) -> Iterator[tuple[int, str]]:
    """Index and line of each record of a file.

    `on_bytes` gets all bytes of the file in order as they are on disk, once. `columns` are those of
    a Parquet file that are wanted, if it has them, None for all.

    Raises InvalidRequestError, which names the file, if it cannot be read to its end.
    """
    with _named(file):
        if file.kind == "parquet":
            if on_bytes is not None:
                _drain(_open_raw(file), on_bytes)
            yield from _parquet_records(file, columns)
            return
        stream = _ByteStream(_open_raw(file), on_bytes)
        lines = _split_lines(_decompressed(stream, file))
        yield from _csv_records(file, lines) if file.kind == "csv" else _json_records(lines)
        stream.drain()


@contextmanager
def _named(file: InputFile) -> Iterator[None]:
    try:
        yield
    except InvalidRequestError:
        raise
    except (OSError, pyarrow.ArrowException) as error:
        reason = cut_off(str(error), 200)
        limit = f"a {file.kind} file that can be read to its end ({reason})"
        raise InvalidRequestError(FIELD, file.name, limit) from error


class _ByteStream:
    """A file for pyarrow whose bytes are shown to `on_bytes` as they are read."""

    def __init__(self, raw: Any, on_bytes: Callable[[bytes], None] | None) -> None:
        self._raw = raw
        self._on_bytes = on_bytes
        self.closed = False

    def read(self, size: int) -> bytes:
        data = bytes(self._raw.read(size))
        if self._on_bytes is not None and data:
            self._on_bytes(data)
        return data

    def close(self) -> None:
        """A decompressor that has come to its end says so; what it left is still to be read."""

    def drain(self) -> None:
        """Reads on to the end of the file, and closes it."""
        while self.read(_CHUNK_BYTES):
            pass
        self._raw.close()


def _open_raw(file: InputFile) -> Any:
    return file.filesystem.open_input_stream(file.path, compression=None)


def _drain(raw: Any, on_bytes: Callable[[bytes], None]) -> None:
    _ByteStream(raw, on_bytes).drain()


def _decompressed(stream: _ByteStream, file: InputFile) -> Any:
    if file.compression is None:
        return stream
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, mode="r"), file.compression)


def _split_lines(stream: Any) -> Iterator[bytes | None]:
    """Lines without their ends, None for each that is too long, of which no more is kept."""
    start: list[bytes] = []
    length = 0
    while chunk := stream.read(_CHUNK_BYTES):
        *ended, rest = chunk.split(b"\n")
        for end in ended:
            yield _joined(start, end, length + len(end))
            start, length = [], 0
        length += len(rest)
        if length > MAX_LINE_BYTES:
            start = []
        else:
            start.append(rest)
    if length:
        yield _joined(start, b"", length)


def _joined(start: list[bytes], end: bytes, length: int) -> bytes | None:
    return None if length > MAX_LINE_BYTES else b"".join([*start, end])


def _json_records(lines: Iterator[bytes | None]) -> Iterator[tuple[int, str]]:
    for index, line in enumerate(lines):
        if line is None:
            yield index, fault_line("line_too_long", _TOO_LONG, None)
            continue
        if index == 0:
            line = line.removeprefix(_BOM)
        text = line.decode(errors="replace").strip()
        if text:
            yield index, text


def _parquet_records(file: InputFile, columns: Sequence[str] | None) -> Iterator[tuple[int, str]]:
    with file.filesystem.open_input_file(file.path) as opened:
        parquet = pyarrow.parquet.ParquetFile(opened, pre_buffer=False, buffer_size=_CHUNK_BYTES)
        names = parquet.schema_arrow.names
        if len(set(names)) != len(names):
            limit = "a Parquet file each of whose columns has a name of its own"
            raise InvalidRequestError(FIELD, file.name, limit)
        if columns is not None:
            columns = [name for name in names if name in columns]
            if not columns:
                # pyarrow's batches of no columns have no rows.
                yield from ((index, "{}") for index in range(parquet.metadata.num_rows))
                return
        batches = parquet.iter_batches(batch_size=_BATCH_ROWS, columns=columns)
        yield from enumerate(line for batch in batches for line in _batch_lines(batch))


def _batch_lines(batch: pyarrow.RecordBatch) -> list[str]:
    try:
        return [dump_json(record) for record in batch.to_pylist()]
    except _NOT_PYTHONS as error:
        if batch.num_rows == 1:
            return [fault_line("bad_parquet", f"not readable: {cut_off(str(error), 200)}", None)]
        rows = (batch.slice(index, 1) for index in range(batch.num_rows))
        return [line for row in rows for line in _batch_lines(row)]


class _CsvLines:
    """Lines of text for Python's csv module, which can be given back.

    A quote that is never closed would take all lines up to the next quote into its row. So a row
    that turns out to be broken costs its first line alone: the others are read again.
    """

    def __init__(self, lines: Iterator[bytes | None]) -> None:
        self._lines = lines
        self._given_back: deque[bytes | None] = deque()
        self._taken: list[bytes | None] = []
        self._length = 0

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        line = self._given_back.popleft() if self._given_back else next(self._lines)
        self._taken.append(line)
        self._length += 0 if line is None else len(line) + _LINE_OVERHEAD
        if line is None or self._length > MAX_LINE_BYTES:
            raise csv.Error(_TOO_LONG)
        return line.decode(errors="replace") + "\n"

    def begin_row(self) -> None:
        self._taken.clear()
        self._length = 0

    def give_back(self) -> None:
        """All lines of the row but its first."""
        self._given_back.extendleft(reversed(self._taken[1:]))


def _csv_records(file: InputFile, lines: Iterator[bytes | None]) -> Iterator[tuple[int, str]]:
    """Records of a CSV file with a header; all values are texts."""
    rows = _csv_rows(lines)
    header = next((row for row in rows if row), None)
    if header is None:
        return
    if isinstance(header, str) or len(set(header)) != len(header):
        reason = header if isinstance(header, str) else "a name is there twice"
        limit = f"a CSV file whose first line names its columns ({reason})"
        raise InvalidRequestError(FIELD, file.name, limit)
    for index, row in enumerate(rows):
        if isinstance(row, str):
            yield index, fault_line("bad_csv", f"not valid CSV: {row}", None)
        elif row and len(row) != len(header):
            reason = f"not valid CSV: got {len(row)} fields, expected {len(header)}"
            yield index, fault_line("bad_csv", reason, None)
        elif row:
            yield index, dump_json(dict(zip(header, row, strict=True)))


def _csv_rows(lines: Iterator[bytes | None]) -> Iterator[list[str] | str]:
    """Rows, empty for an empty line, or the reason why there is none."""
    # The limit is the process's; the module's own, 131,072 characters, is less than a prompt's.
    csv.field_size_limit(MAX_LINE_BYTES)
    source = _CsvLines(lines)
    reader = csv.reader(source, strict=True)
    first = True
    while True:
        source.begin_row()
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            source.give_back()
            yield str(error)
            continue
        if first and row:
            row[0] = row[0].removeprefix("\ufeff")
        first = False
        yield row
