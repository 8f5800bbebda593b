"""Records of input files as lines of JSON text, and the numbers that rows have in a job.

A row's number is its file's index and its record's index within that file, both from 0. It is
unique within a job and sorts in the order of the input.

What a reader itself finds wrong with a record (a line that is too long, a broken row of a CSV file,
a custom_id that came before) travels to the job's workers as a *fault*: a line that begins with a
newline, which no line of a file can. `parse_request` turns it into the row's error.
"""

from __future__ import annotations

import json
import math
from datetime import date, time
from typing import Any

# 16 MiB of one record are far beyond any prompt, and still little memory.
MAX_LINE_BYTES = 16 << 20
# The column of a row's number, by which Ray Data's checkpoints say which rows are done.
CHECKPOINT_COLUMN = "row"
_RECORD_BITS = 40
_FAULT = "\n"


def row_number(file: int, record: int) -> int:
    """The number of a record: of file `file` of the input, at `record` within it."""
    return file << _RECORD_BITS | record


def split_row(row: int) -> tuple[int, int]:
    """The index of a row's file and that of its record in the file, both from 0."""
    return row >> _RECORD_BITS, row & ((1 << _RECORD_BITS) - 1)


def dump_json(value: Any) -> str:
    """JSON on one line, readable where its text can be written as UTF-8, else in ASCII.

    Numbers that JSON does not have, infinities and NaN, become null. What JSON has no type for
    (times, decimals, bytes of a Parquet file) becomes text.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=_as_text)
    except ValueError:
        return dump_json(_without_nan(value))
    try:
        text.encode()
    except UnicodeEncodeError:
        # Half of a surrogate pair, which JSON can say and UTF-8 cannot.
        return json.dumps(value, default=_as_text)
    return text


def _as_text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value.isoformat() if isinstance(value, date | time) else str(value)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def fault_line(code: str, message: str, param: str | None, custom_id: str | None = None) -> str:
    """The line of a record that cannot be a request; what `read_fault` reads."""
    return _FAULT + json.dumps([code, message, param, custom_id])


def read_fault(line: str) -> tuple[str, str, str | None, str | None] | None:
    """Code, message, field and custom_id of a fault, or None if the line is a record."""
    if not line.startswith(_FAULT):
        return None
    code, message, param, custom_id = json.loads(line)
    return code, message, param, custom_id
