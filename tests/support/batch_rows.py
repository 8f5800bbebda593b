"""Rows of batch jobs and parts of them on disk, as a job leaves them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from ray.data._internal.execution.interfaces import TaskContext
from ray.data._internal.planner.plan_write_op import WRITE_UUID_KWARG_NAME

from twotower.batch.answers import error_row, output_row, output_table
from twotower.batch.requests import BatchRequest, RowError
from twotower.batch.sink import Format, PartNames, PartSink

WRITE_UUID = "0123456789abcdef0123456789abcdef"


@dataclass(frozen=True)
class FixedAnswer:
    """An answer of a service that said `text`."""

    text: str = "said"
    status: int = 200
    request_id: str = "req-1"
    error: dict[str, Any] | None = None

    @property
    def body(self) -> dict[str, Any]:
        if self.error is not None:
            return {"error": self.error}
        usage = {
            "prompt_tokens": 3,
            "completion_tokens": 5,
            "twotower": {"nfe": 7, "context_passes": 2},
        }
        return {"choices": [{"text": self.text, "finish_reason": "length"}], "usage": usage}


def good_row(row: int, record: dict[str, Any] | None = None) -> dict[str, Any]:
    request = BatchRequest(f"id-{row}", "/v1/completions", {"prompt": "p"}, record)
    return output_row(row, request, FixedAnswer(f"text {row}"))


def bad_row(row: int) -> dict[str, Any]:
    return error_row(row, f"id-{row}", RowError("empty_prompt", "prompt: is empty", "prompt"))


@dataclass
class JobFolders:
    """The folders of a job below `root`, with parts written by the sink itself."""

    root: Path
    format: Format = "jsonl"
    parts: Path = field(init=False)
    checkpoints: Path = field(init=False)

    def __post_init__(self) -> None:
        self.parts, self.checkpoints = self.root / "parts", self.root / "checkpoints"
        self.parts.mkdir(parents=True)
        self.checkpoints.mkdir()

    @property
    def paths(self) -> tuple[str, str]:
        return str(self.parts), str(self.checkpoints)

    def write(self, task: int, rows: Iterable[dict[str, Any]]) -> str:
        """Writes the files of a part and commits nothing. Its name."""
        sink = PartSink(str(self.parts), names=["in.jsonl"], format=self.format)
        kwargs = {WRITE_UUID_KWARG_NAME: WRITE_UUID}
        sink.write([output_table(list(rows))], TaskContext(task, "Write", kwargs=kwargs))
        return PartNames().get_filename_for_task(WRITE_UUID, task)

    def checkpoint(self, part: str, rows: Iterable[int], *, pending: bool = False) -> None:
        """Writes a checkpoint as Ray Data does."""
        name = f"{part}.pending.parquet" if pending else f"{part}.parquet"
        table = pyarrow.table({"row": pyarrow.array(list(rows), pyarrow.int64())})
        pyarrow.parquet.write_table(table, self.checkpoints / name)

    def commit(self, task: int, good: Iterable[int], bad: Iterable[int] = ()) -> str:
        """A part with good and bad rows, written and committed."""
        good, bad = list(good), list(bad)
        rows = [*map(good_row, good), *map(bad_row, bad)]
        part = self.write(task, rows)
        self.checkpoint(part, [*bad, *good])
        return part
