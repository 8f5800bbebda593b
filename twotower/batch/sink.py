"""Writes the rows of a job as they finish, one part a write task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import pyarrow
import pyarrow.compute
import pyarrow.fs
import pyarrow.parquet
from ray._common.retry import call_with_retry
from ray.data._internal.planner.plan_write_op import WRITE_UUID_KWARG_NAME
from ray.data.block import Block, BlockAccessor
from ray.data.datasource import FilenameProvider
from ray.data.datasource.file_datasink import _FileDatasink

from twotower.batch.answers import OUTPUT_SCHEMA
from twotower.batch.filesystems import join_path, open_filesystem
from twotower.batch.output_lines import error_line, good_line

Format = Literal["jsonl", "parquet"]

ERRORS_SUFFIX = ".errors.jsonl"
# What a part of Parquet has; its errors stand in the file beside it.
PARQUET_SCHEMA = pyarrow.schema([field for field in OUTPUT_SCHEMA if field.name != "error"])
_ROWS_PER_GROUP = 1024


class PartNames(FilenameProvider):  # type: ignore[misc]
    """Names of parts. None is the beginning of another, as Ray Data deletes by prefix."""

    def get_filename_for_task(self, write_uuid: str, task_index: int) -> str:
        """The part's base name, which a second attempt of the same task has again."""
        return f"part-{write_uuid}-{task_index:010}"


class PartSink(_FileDatasink):  # type: ignore[misc]
    """The parts of a job in a folder: `{base}.jsonl` or `{base}.parquet`, `{base}.errors.jsonl`.

    `folder` is a path or URL. `names` are the base names of the input's files in order, for the
    errors of their rows. Rows of a part are in the order of the input. With Ray Data's checkpoints
    a part is committed after its files are written; files without a committed checkpoint count for
    nothing. A part has at least `rows_per_part` rows (None: those of one block), but the last.
    """

    def __init__(
        self,
        folder: str,
        *,
        names: Sequence[str],
        format: Format = "jsonl",
        rows_per_part: int | None = None,
    ) -> None:
        filesystem, path = open_filesystem(folder, "output")
        super().__init__(path, filesystem=filesystem, filename_provider=PartNames())
        self._names = tuple(names)
        self._format = format
        self._rows_per_part = rows_per_part

    @property
    def min_rows_per_write(self) -> int | None:
        """Rows that Ray Data waits for before it begins a part."""
        return self._rows_per_part

    def write(self, blocks: Iterable[Block], ctx: Any) -> None:
        """Writes the rows of one task, which have the columns of `OUTPUT_SCHEMA`."""
        tables = [_as_output(block) for block in blocks]
        if not tables:
            return
        table = pyarrow.concat_tables(tables).sort_by("row")
        base = self.filename_provider.get_filename_for_task(
            ctx.kwargs[WRITE_UUID_KWARG_NAME], ctx.task_idx
        )
        failed = pyarrow.compute.is_valid(table["error"])
        good = table.filter(pyarrow.compute.invert(failed))
        write = self._write_jsonl if self._format == "jsonl" else self._write_parquet
        self._put(f"{base}.{self._format}", good, write)
        self._put(f"{base}{ERRORS_SUFFIX}", table.filter(failed), self._write_errors)

    def _put(
        self, name: str, table: pyarrow.Table, write: Callable[[pyarrow.Table, Any], None]
    ) -> None:
        path = join_path(self.path, name)
        call_with_retry(
            lambda: self._put_once(path, table, write),
            description=f"write {path}",
            match=self._data_context.retried_io_errors,
        )

    def _put_once(
        self, path: str, table: pyarrow.Table, write: Callable[[pyarrow.Table, Any], None]
    ) -> None:
        if table.num_rows:
            with self.open_output_stream(path) as stream:
                write(table, stream)
        elif self.filesystem.get_file_info(path).type is not pyarrow.fs.FileType.NotFound:
            # An attempt of the same task that was lost had such rows.
            self.filesystem.delete_file(path)

    def _write_jsonl(self, table: pyarrow.Table, stream: Any) -> None:
        for columns in table.to_pylist():
            stream.write(good_line(columns).encode() + b"\n")

    def _write_errors(self, table: pyarrow.Table, stream: Any) -> None:
        for columns in table.to_pylist():
            stream.write(error_line(columns, self._names).encode() + b"\n")

    def _write_parquet(self, table: pyarrow.Table, stream: Any) -> None:
        pyarrow.parquet.write_table(
            table.drop_columns("error"), stream, row_group_size=_ROWS_PER_GROUP
        )


def _as_output(block: Block) -> pyarrow.Table:
    table = BlockAccessor.for_block(block).to_arrow()
    return table.select(OUTPUT_SCHEMA.names).cast(OUTPUT_SCHEMA)
