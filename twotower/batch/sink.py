"""Writes the rows of a job as they finish, one part a write task."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from ray.data.datasource.file_datasink import _FileDatasink

Format = Literal["jsonl", "parquet"]


class PartSink(_FileDatasink):  # type: ignore[misc]
    """The parts of a job in a folder: `{base}.jsonl` or `{base}.parquet`, `{base}.errors.jsonl`.

    `folder` is a path or URL. `names` are the base names of the input's files in order, for the
    errors of their rows. With Ray Data's checkpoints a part is committed after its files are
    written; files without a committed checkpoint count for nothing.
    """

    def __init__(self, folder: str, *, names: Sequence[str], format: Format = "jsonl") -> None:
        raise NotImplementedError

    def write(self, blocks: Iterable[Any], ctx: Any) -> None:
        """Writes the rows of one task, which have the columns of `OUTPUT_SCHEMA`."""
        raise NotImplementedError
