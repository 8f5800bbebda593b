"""What a batch job makes of its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from twotower.batch.answers import error_row, output_row, output_table
from twotower.batch.requests import BatchDefaults, BatchRequest, RowError, parse_request
from twotower.data.caller import Answer


class BatchWork:
    """Requests of records, and rows of output; fulfils `data.completer.RowWork`."""

    row_errors: tuple[type[Exception], ...] = (RowError,)
    columns: Sequence[str] | None = None

    def __init__(self, defaults: BatchDefaults) -> None:
        self._defaults = defaults

    def to_request(self, row: Mapping[str, Any]) -> BatchRequest:
        """The request of a record. Raises RowError."""
        return parse_request(row["row"], row["line"], self._defaults)

    def to_output(
        self, row: Mapping[str, Any], request: BatchRequest, answer: Answer
    ) -> dict[str, Any]:
        """The row of an answer."""
        return output_row(row["row"], request, answer)

    def to_error(self, row: Mapping[str, Any], error: RowError) -> dict[str, Any]:
        """The row of a record that made no request."""
        return error_row(row["row"], None, error)

    def to_table(self, _batch: pa.Table, outputs: Sequence[dict[str, Any]]) -> pa.Table:
        """Rows of output as the sink takes them."""
        return output_table(outputs)
