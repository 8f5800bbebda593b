"""The rows of an input as a source of Ray Data."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import pyarrow
from ray.data import Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from twotower.batch.inputs import InputFile
from twotower.batch.lines import fault_line, row_number
from twotower.batch.records import read_records
from twotower.batch.requests import custom_id_of

ROW_SCHEMA = pyarrow.schema(
    [pyarrow.field("row", pyarrow.int64(), nullable=False), ("line", pyarrow.string())]
)
# A block of long lines ends before its number of rows.
_BLOCK_CHARACTERS = 8 << 20


class InputSource(Datasource):  # type: ignore[misc]
    """Rows of `files` for `ray.data.read_datasource`, in blocks of at most `rows_per_block` rows.

    Columns: `row` (int64, see `lines.row_number`) and `line` (text: the record as JSON or a fault).
    One task reads a file, streaming. `duplicates` are the rows that the scan found to
    repeat a custom_id, ascending; they come as faults. `distributed` says whether every node sees
    the files; if not, they are read on the driver's.

    Ray Data puts blocks of a task together up to `DataContext.target_max_block_size`.
    """

    def __init__(
        self,
        files: Sequence[InputFile],
        *,
        rows_per_block: int = 64,
        duplicates: Iterable[int] = (),
        prompt_column: str = "prompt",
        distributed: bool = True,
    ) -> None:
        self._files = tuple(files)
        self._rows_per_block = rows_per_block
        self._duplicates = tuple(duplicates)
        self._prompt_column = prompt_column
        self._distributed = distributed

    @property
    def supports_distributed_reads(self) -> bool:
        """False if only the driver's node has the files."""
        return self._distributed

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of all files, as they are on disk."""
        return sum(file.size for file in self._files)

    def get_read_tasks(
        self,
        parallelism: int,  # noqa: ARG002
        per_task_row_limit: int | None = None,
        data_context: Any = None,  # noqa: ARG002
    ) -> list[ReadTask]:
        """A task per file, whatever parallelism is asked for."""
        return [
            ReadTask(
                self._reader(index, file),
                BlockMetadata(
                    num_rows=None, size_bytes=file.size, exec_stats=None, input_files=[file.path]
                ),
                schema=ROW_SCHEMA,
                per_task_row_limit=per_task_row_limit,
            )
            for index, file in enumerate(self._files)
        ]

    def _reader(self, index: int, file: InputFile) -> partial[Iterator[pyarrow.Table]]:
        """What reads a file; it carries the duplicates of that file alone."""
        first, last = (
            bisect_left(self._duplicates, row_number(number, 0)) for number in (index, index + 1)
        )
        own = frozenset(self._duplicates[first:last])
        return partial(read_blocks, file, index, self._rows_per_block, own, self._prompt_column)


def read_blocks(
    file: InputFile,
    index: int,
    rows_per_block: int,
    duplicates: frozenset[int] = frozenset(),
    prompt_column: str = "prompt",
) -> Iterator[pyarrow.Table]:
    """Tables of `ROW_SCHEMA` with the records of a file, the input's file number `index`.

    Raises InvalidRequestError, which names the file, if it cannot be read to its end.
    """
    rows: list[int] = []
    lines: list[str] = []
    size = 0
    for record, line in read_records(file):
        row = row_number(index, record)
        rows.append(row)
        lines.append(_duplicate(row, line, prompt_column) if row in duplicates else line)
        size += len(line)
        if len(rows) == rows_per_block or size >= _BLOCK_CHARACTERS:
            yield pyarrow.table([rows, lines], schema=ROW_SCHEMA)
            rows, lines, size = [], [], 0
    if rows:
        yield pyarrow.table([rows, lines], schema=ROW_SCHEMA)


def _duplicate(row: int, line: str, prompt_column: str) -> str:
    custom_id = custom_id_of(row, line, prompt_column)
    reason = "custom_id: an earlier row has the same"
    return fault_line("duplicate_custom_id", reason, "custom_id", custom_id)
