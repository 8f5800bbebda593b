"""The parts of a job on disk, and which of their rows are done.

The checkpoints alone say that: a row is done if a committed checkpoint has it, and then it is in
the part of that checkpoint's name, as a good row or as an error. Whatever else a part's files hold
is what a crash has left.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy
import pyarrow
import pyarrow.fs
import pyarrow.parquet

from twotower.batch.filesystems import join_path, open_filesystem
from twotower.batch.lines import CHECKPOINT_COLUMN
from twotower.towers.errors import InvalidRequestError

_CHECKPOINT = re.compile(r"(part-\w+-\d+)\.parquet")
_PENDING = re.compile(r"(part-\w+-\d+)\.pending\.parquet")
_PART_FILE = re.compile(r"(part-\w+-\d+)\.(jsonl|parquet|errors\.jsonl)")


def repeated_rows(parts: Sequence[numpy.ndarray]) -> numpy.ndarray:
    """Rows that are in several of the arrays, ascending, one time fewer than they are there."""
    if not parts:
        return numpy.array([], dtype=numpy.int64)
    rows: numpy.ndarray = numpy.sort(numpy.concatenate(parts))
    twice: numpy.ndarray = rows[1:][rows[1:] == rows[:-1]]
    return twice


class PartFolder:
    """The parts in `folder` with the checkpoints of Ray Data in `checkpoints`; paths or URLs."""

    def __init__(self, folder: str, checkpoints: str) -> None:
        self.filesystem, self._path = open_filesystem(folder, "output")
        self._checkpoint_filesystem, self._checkpoint_path = open_filesystem(
            checkpoints, "checkpoints"
        )

    def committed(self) -> list[str]:
        """Names of the committed parts, sorted."""
        return self._checkpoints(_CHECKPOINT)

    def pending(self) -> list[str]:
        """Names of the parts that were begun and not committed, sorted."""
        return self._checkpoints(_PENDING)

    def rows(self, part: str) -> numpy.ndarray:
        """Numbers of the rows of a committed part that are done, int64, ascending."""
        with self._checkpoint_filesystem.open_input_file(self._checkpoint(part)) as file:
            table = pyarrow.parquet.ParquetFile(file).read([CHECKPOINT_COLUMN])
        return numpy.sort(table[CHECKPOINT_COLUMN].to_numpy())

    def files(self) -> dict[str, str]:
        """The files of all parts, committed or not: file name to part."""
        infos = self.filesystem.get_file_info(
            pyarrow.fs.FileSelector(self._path, allow_not_found=True)
        )
        matches = (_PART_FILE.fullmatch(info.base_name) for info in infos)
        return {match[0]: match[1] for match in matches if match}

    def path(self, name: str) -> str:
        """The path of a part's file in `filesystem`."""
        return join_path(self._path, name)

    def open_file(self, path: str) -> pyarrow.NativeFile:
        """A part's file for reading at any place. Raises InvalidRequestError if it is missing."""
        try:
            return self.filesystem.open_input_file(path)
        except FileNotFoundError as error:
            raise InvalidRequestError("output", path, "a file that its checkpoint names") from error

    def delete_file(self, name: str) -> None:
        """Deletes a file of a part."""
        self.filesystem.delete_file(self.path(name))

    def undo(self, part: str) -> None:
        """Makes all rows of a part undone."""
        self._checkpoint_filesystem.delete_file(self._checkpoint(part))

    def keep_rows(self, part: str, rows: numpy.ndarray) -> None:
        """Makes all rows of a part but `rows` undone, at once."""
        # If this ends halfway, Ray Data deletes the file as that of a part that does not exist.
        aside = join_path(self._checkpoint_path, f"retry-{part}.pending.parquet")
        pyarrow.parquet.write_table(
            pyarrow.table({CHECKPOINT_COLUMN: rows}),
            aside,
            filesystem=self._checkpoint_filesystem,
        )
        self._replace(aside, self._checkpoint(part))

    def _replace(self, aside: str, path: str) -> None:
        self._checkpoint_filesystem.move(aside, path)

    def _checkpoint(self, part: str) -> str:
        return join_path(self._checkpoint_path, f"{part}.parquet")

    def _checkpoints(self, pattern: re.Pattern[str]) -> list[str]:
        infos = self._checkpoint_filesystem.get_file_info(
            pyarrow.fs.FileSelector(self._checkpoint_path, allow_not_found=True)
        )
        matches = (pattern.fullmatch(info.base_name) for info in infos)
        return sorted(match[1] for match in matches if match)
