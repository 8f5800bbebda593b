"""One look at the whole input before a job begins."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy

from twotower.batch.inputs import InputFile
from twotower.batch.lines import row_number
from twotower.batch.records import read_records
from twotower.batch.requests import custom_id_of

# What of a record of Parquet says its name and its format, beside the prompt's column.
_NAMING_COLUMNS = ("custom_id", "id", "method", "url", "body")


@dataclass(frozen=True)
class InputSummary:
    """What the scan of an input found.

    `rows` counts records per file in order of `files`; `fingerprint` is a hash (hexadecimal) of all
    bytes, of the order of files and of their kinds, but not of their names; `duplicates` are the
    numbers of the rows that repeat a custom_id of an earlier row, ascending.
    """

    files: tuple[InputFile, ...]
    rows: tuple[int, ...]
    fingerprint: str
    duplicates: tuple[int, ...]

    @property
    def total_rows(self) -> int:
        """Records of all files, good and bad."""
        return sum(self.rows)


def scan(
    files: Sequence[InputFile],
    *,
    prompt_column: str = "prompt",
    progress: Callable[[int], None] | None = None,
) -> InputSummary:
    """Reads the input once, streaming, with 8 bytes of memory a row; `progress` gets the number of
    bytes read since its last call.

    A custom_id belongs to the first row that has it, be that row good or bad. Names are compared by
    hashes of 64 bits; only if two are equal the input is read a second time, and then the texts of
    these names decide, so that rows with equal hashes and different names stay good.

    Raises InvalidRequestError, which names the file, if one cannot be read to its end.
    """
    fingerprint = blake2b(digest_size=16)
    counts: list[int] = []
    hashes = array("Q")
    for index, file in enumerate(files):
        contents = _Contents(progress)
        names = _names(index, file, prompt_column, contents.add)
        count = 0
        for count, (_, name) in enumerate(names, start=1):  # noqa: B007
            if name is not None:
                hashes.append(_hash(name))
        counts.append(count)
        fingerprint.update(file.kind.encode() + b":" + contents.digest())
    duplicates = _duplicates(files, prompt_column, _repeated(hashes))
    return InputSummary(tuple(files), tuple(counts), fingerprint.hexdigest(), duplicates)


class _Contents:
    """The hash of a file's bytes, which also says how many there were."""

    def __init__(self, progress: Callable[[int], None] | None) -> None:
        self._hash = blake2b(digest_size=32)
        self._progress = progress

    def add(self, data: bytes) -> None:
        self._hash.update(data)
        if self._progress is not None:
            self._progress(len(data))

    def digest(self) -> bytes:
        return self._hash.digest()


def _names(
    index: int,
    file: InputFile,
    prompt_column: str,
    on_bytes: Callable[[bytes], None] | None = None,
) -> Iterator[tuple[int, str | None]]:
    """Number and custom_id of each record of a file."""
    columns = [*_NAMING_COLUMNS, prompt_column]
    for record, line in read_records(file, on_bytes=on_bytes, columns=columns):
        row = row_number(index, record)
        yield row, custom_id_of(row, line, prompt_column)


def _hash(name: str) -> int:
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big")


def _repeated(hashes: array[int]) -> frozenset[int]:
    """The values that are there more than once. Sorts `hashes`."""
    if not hashes:
        return frozenset()
    values = numpy.frombuffer(hashes, dtype=numpy.uint64)
    values.sort()
    return frozenset(values[1:][values[1:] == values[:-1]].tolist())


def _duplicates(
    files: Sequence[InputFile], prompt_column: str, repeated: frozenset[int]
) -> tuple[int, ...]:
    """The rows whose name, of those with a repeated hash, an earlier row has."""
    if not repeated:
        return ()
    seen: set[str] = set()
    rows: list[int] = []
    for index, file in enumerate(files):
        for row, name in _names(index, file, prompt_column):
            if name is None or _hash(name) not in repeated:
                continue
            if name in seen:
                rows.append(row)
            seen.add(name)
    return tuple(rows)
