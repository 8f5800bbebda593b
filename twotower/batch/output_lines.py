"""Lines of the files that a job writes: OpenAI's batch format, or a plain record with its answer.

A row's `id` is `batch_req_` and the row's number in hexadecimal, from which an error file's rows
are found again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from twotower.batch.lines import dump_json, split_row

_PREFIX = "batch_req_"
# What a plain record gets. A column of its own with such a name is kept as `input_...`.
_ADDED = ("text", "finish_reason", "usage")


def good_line(columns: Mapping[str, Any]) -> str:
    """The line of a good row of `OUTPUT_SCHEMA`."""
    response = json.loads(columns["response"])
    if columns["input"] is None:
        return dump_json(
            {**_head(columns), "response": _response(columns, response), "error": None}
        )
    record = json.loads(columns["input"])
    kept = {f"input_{name}" if name in _ADDED else name: value for name, value in record.items()}
    return dump_json(
        {
            **kept,
            "custom_id": columns["custom_id"],
            "text": columns["text"],
            "finish_reason": columns["finish_reason"],
            "usage": response.get("usage"),
        }
    )


def error_line(columns: Mapping[str, Any], names: Sequence[str]) -> str:
    """The line of a row that ended as an error; `names` are those of the input's files."""
    file, record = split_row(columns["row"])
    error = json.loads(columns["error"])
    response = None
    if columns["status"]:
        response = _response(columns, json.loads(columns["response"]))
    where = {"line": record + 1, "file": names[file]}
    shown = {name: error[name] for name in ("code", "message", "param")}
    return dump_json({**_head(columns), "response": response, "error": {**shown, **where}})


def row_of_error(line: bytes) -> int:
    """The number of the row that a line of `error_line` belongs to."""
    return int(json.loads(line)["id"].removeprefix(_PREFIX), 16)


def _head(columns: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": f"{_PREFIX}{columns['row']:x}", "custom_id": columns["custom_id"]}


def _response(columns: Mapping[str, Any], body: Any) -> dict[str, Any]:
    return {
        "status_code": columns["status"],
        "request_id": columns["request_id"],
        "body": body,
    }
