"""One look at the whole input before a job begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from twotower.batch.inputs import InputFile


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
    """Reads the input once, streaming, with 8 bytes of memory a row; `progress` gets bytes read.

    Raises InvalidRequestError, which names the file, if one cannot be read to its end.
    """
    raise NotImplementedError
