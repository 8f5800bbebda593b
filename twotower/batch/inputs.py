"""What a user names as the input of a job: files, and the source of their rows for Ray Data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import pyarrow.fs
from ray.data import Datasource
from ray.data.datasource import ReadTask

Kind = Literal["jsonl", "csv", "parquet"]


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
        raise NotImplementedError


def find_inputs(
    inputs: Sequence[str], *, scratch: Path | None = None, stdin: BinaryIO | None = None
) -> tuple[InputFile, ...]:
    """The files that `inputs` name, in order: files, folders, globs, URLs, or `-` for stdin.

    A folder stands for the files in it (not in folders below) whose kind is known, a glob for what
    it matches; both sorted. A file that is named twice is read once. `-` is read as JSON lines to
    its end and kept in `scratch`.
    Kinds, by suffix: JSON lines (.jsonl, .ndjson, .json) and CSV (.csv), both also compressed
    (.gz, .bz2, .zst, .lz4), and Parquet (.parquet).

    Raises InvalidRequestError for what does not exist, is of no known kind, or leaves no file.
    """
    raise NotImplementedError


class InputSource(Datasource):
    """Rows of `files` for `ray.data.read_datasource`, in blocks of at most `rows_per_block` rows.

    Columns: `row` (int64, see `lines.row_number`) and `line` (text: the record as JSON, or a fault).
    One task reads a file, streaming. `duplicates` are the rows that the scan found to
    repeat a custom_id: they come as faults.
    """

    def __init__(
        self,
        files: Sequence[InputFile],
        *,
        rows_per_block: int = 64,
        duplicates: Iterable[int] = (),
        distributed: bool = True,
    ) -> None:
        raise NotImplementedError

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: Any = None,
    ) -> list[ReadTask]:
        """A task per file, whatever parallelism is asked for."""
        raise NotImplementedError
