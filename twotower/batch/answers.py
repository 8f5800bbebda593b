"""Rows between the callers of a service and the files of a job: a fixed set of columns.

Good rows and errors have the same columns, so that blocks of a pipeline can be joined.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import pyarrow

from twotower.batch.lines import dump_json
from twotower.batch.requests import BatchRequest, RowError

OUTPUT_SCHEMA = pyarrow.schema(
    [
        pyarrow.field("row", pyarrow.int64(), nullable=False),
        ("custom_id", pyarrow.string()),
        ("status", pyarrow.int32()),
        ("text", pyarrow.string()),
        ("finish_reason", pyarrow.string()),
        ("prompt_tokens", pyarrow.int64()),
        ("completion_tokens", pyarrow.int64()),
        ("nfe", pyarrow.int64()),
        ("context_passes", pyarrow.int64()),
        ("response", pyarrow.string()),
        ("request_id", pyarrow.string()),
        ("input", pyarrow.string()),
        ("error", pyarrow.string()),
    ]
)


class ServiceAnswer(Protocol):
    """What is read of a service's answer: `twotower.data.caller.Answer` is one."""

    @property
    def status(self) -> int:
        """The status of HTTP, 0 if no connection could be made."""

    @property
    def body(self) -> Mapping[str, Any]:
        """The answer, or OpenAI's object of an error."""

    @property
    def request_id(self) -> str:
        """The service's name for the request."""


def output_row(row: int, request: BatchRequest, answer: ServiceAnswer) -> dict[str, Any]:
    """The row of an answer, be it good or not: every column of `OUTPUT_SCHEMA`.

    Of several choices `text` and `finish_reason` are the first's; `response` has all.
    """
    columns = _columns(row, request.custom_id)
    columns["status"] = answer.status
    columns["request_id"] = answer.request_id
    columns["response"] = dump_json(answer.body)
    if request.record is not None:
        columns["input"] = dump_json(request.record)
    choice = _first_choice(answer.body) if answer.status == 200 else None
    if choice is None:
        columns["error"] = dump_json(_error_of(answer))
        return columns
    columns["text"] = _text_of(choice)
    columns["finish_reason"] = _text(choice.get("finish_reason"))
    columns.update(_counts(answer.body))
    return columns


def error_row(row: int, custom_id: str | None, error: RowError) -> dict[str, Any]:
    """The row of a record that never became a request; without `custom_id` the error's is taken."""
    columns = _columns(row, error.custom_id if custom_id is None else custom_id)
    columns["error"] = dump_json(
        {
            "code": error.code,
            "message": error.message,
            "param": error.param,
            "type": "invalid_request_error",
        }
    )
    return columns


def output_table(rows: Sequence[Mapping[str, Any]]) -> pyarrow.Table:
    """Rows of `output_row` and `error_row` as one table of `OUTPUT_SCHEMA`."""
    return pyarrow.Table.from_pylist(list(rows), schema=OUTPUT_SCHEMA)


def _columns(row: int, custom_id: str | None) -> dict[str, Any]:
    columns: dict[str, Any] = dict.fromkeys(OUTPUT_SCHEMA.names)
    columns.update(row=row, custom_id=custom_id, status=0, request_id="")
    columns.update(prompt_tokens=0, completion_tokens=0, nfe=0, context_passes=0)
    return columns


def _first_choice(body: Mapping[str, Any]) -> Mapping[str, Any] | None:
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return None
    return choices[0]


def _text_of(choice: Mapping[str, Any]) -> str | None:
    message = choice.get("message")
    return _text(message.get("content") if isinstance(message, dict) else choice.get("text"))


def _text(value: Any) -> str | None:
    # Half of a surrogate pair, which JSON can say, has no place in a column of text.
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else None


def _counts(body: Mapping[str, Any]) -> dict[str, int]:
    usage = _object(body.get("usage"))
    own = _object(usage.get("twotower"))
    return {
        "prompt_tokens": _count(usage.get("prompt_tokens")),
        "completion_tokens": _count(usage.get("completion_tokens")),
        "nfe": _count(own.get("nfe")),
        "context_passes": _count(own.get("context_passes")),
    }


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _error_of(answer: ServiceAnswer) -> dict[str, Any]:
    """OpenAI's error object of an answer that is not good, whatever the service sent."""
    error = _object(answer.body.get("error"))
    if answer.status == 200:
        code, message = "bad_answer", "the service's answer has no choices"
    elif answer.status == 0:
        code, message = "no_connection", "no connection to the service could be made"
    else:
        code, message = str(answer.status), f"the service answered with status {answer.status}"
    return {
        "code": error.get("code") or code,
        "message": error.get("message") or message,
        "param": error.get("param"),
        "type": error.get("type") or "server_error",
    }
