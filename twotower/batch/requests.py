"""What a record of the input asks for: one request, or an error that names what is wrong with it.

Two kinds of records are told apart row by row.

*OpenAI's batch format* has `custom_id`, `method`, `url` and an object `body`, which is what is
posted.

*A plain record* is anything else: a line of JSON, a row of a CSV or Parquet file. Its prompt column
holds a text, or a list of token ids, or a list of messages, which makes it a chat. Without that
column a column `messages` is taken. `custom_id`, or else `id`, names the row if it is a text or a
whole number. All other columns are passed through to the output and never read as parameters: a
column `seed` or `max_tokens` of a data set is data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from twotower.batch.lines import MAX_LINE_BYTES, read_fault
from twotower.data.bodies import CHAT, COMPLETIONS, row_seed
from twotower.towers.errors import cut_off, shorten

MAX_CUSTOM_ID = 512
# The parser and the writer of JSON call themselves for each level of a value.
_MAX_DEPTH = 100


@dataclass(frozen=True)
class BatchDefaults:
    """What holds for every row of a job.

    `prompt_column` names the prompt of a plain record; `body` has fields of OpenAI's body, which
    rows without a body of their own get, and which others get where they say nothing; `seed` is
    the job's, from which each row's follows.
    """

    prompt_column: str = "prompt"
    body: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True)
class BatchRequest:
    """A row that can be posted.

    `body` is what is posted to `url`; it has a `seed` and no `stream`. `record` is the input of a
    plain row, which its output repeats, and None for OpenAI's format.
    """

    custom_id: str
    url: str
    body: dict[str, Any]
    record: dict[str, Any] | None


class RowError(Exception):
    """A fault of a row that no further attempt would mend; it becomes the row's error.

    `param` names the field at fault, None for the row as a whole. `custom_id` is the row's name if
    it has a valid one that could be read.
    """

    def __init__(
        self, code: str, message: str, param: str | None = None, custom_id: str | None = None
    ) -> None:
        self.code = code
        self.message = message
        self.param = param
        self.custom_id = custom_id
        super().__init__(message)

    def __reduce__(self) -> tuple[type[RowError], tuple[str, str, str | None, str | None]]:
        return type(self), (self.code, self.message, self.param, self.custom_id)


def parse_request(row: int, line: str, defaults: BatchDefaults) -> BatchRequest:
    """The request of a record. Raises RowError, and nothing else, whatever the line holds."""
    record = _read(line)
    custom_id = _custom_id(row, record, defaults.prompt_column)
    try:
        if is_openai(record, defaults.prompt_column):
            return _openai_request(custom_id, record, defaults)
        return _plain_request(custom_id, record, defaults)
    except RowError as error:
        error.custom_id = custom_id
        raise


def custom_id_of(row: int, line: str, prompt_column: str) -> str | None:
    """The name that a record has or is given, None if it has no valid one or is no record."""
    try:
        return _custom_id(row, _read(line), prompt_column)
    except RowError:
        return None


def is_openai(record: Mapping[str, Any], prompt_column: str) -> bool:
    """Whether a record is in OpenAI's batch format, perhaps a faulty one."""
    if isinstance(record.get("body"), dict):
        return any(record.get(name) is not None for name in ("custom_id", "method", "url"))
    return prompt_column not in record and "url" in record and "method" in record


def _read(line: str) -> dict[str, Any]:
    fault = read_fault(line)
    if fault is not None:
        raise RowError(*fault)
    if len(line) > MAX_LINE_BYTES:
        raise RowError("line_too_long", f"the line is longer than {MAX_LINE_BYTES} bytes")
    try:
        value = json.loads(line, parse_float=_finite, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise RowError("bad_json", f"not valid JSON: {cut_off(str(error), 200)}") from None
    if line.count("[") + line.count("{") > _MAX_DEPTH and _is_deep(value):
        raise RowError("bad_json", f"not valid JSON here: more than {_MAX_DEPTH} levels deep")
    if not isinstance(value, dict):
        raise RowError("not_an_object", f"got {shorten(value)}, expected a JSON object")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"number {cut_off(text, 40)} out of range")
    return value


def _refuse(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_MAX_DEPTH + 1):
        inner = [item for item in level if isinstance(item, dict | list)]
        level = [
            child for item in inner for child in (item.values() if isinstance(item, dict) else item)
        ]
    return bool(level)


def _custom_id(row: int, record: Mapping[str, Any], prompt_column: str) -> str:
    value = record.get("custom_id")
    if is_openai(record, prompt_column):
        if value is None:
            raise RowError("missing_custom_id", "custom_id: is missing", "custom_id")
        if not isinstance(value, str):
            raise _wrong_type("custom_id", value, "a text")
    elif value is None:
        other = record.get("id")
        if not isinstance(other, str | int) or isinstance(other, bool) or other == "":
            return f"row-{row}"
        return _checked_id("id", other)
    elif not isinstance(value, str | int) or isinstance(value, bool):
        raise _wrong_type("custom_id", value, "a text or a whole number")
    return _checked_id("custom_id", value)


def _checked_id(name: str, value: str | int) -> str:
    text = str(value)
    if not 1 <= len(text) <= MAX_CUSTOM_ID:
        limit = f"1 to {MAX_CUSTOM_ID} characters"
        raise RowError("invalid_custom_id", f"{name}: got {len(text)}, expected {limit}", name)
    try:
        text.encode()
    except UnicodeEncodeError:
        reason = f"{name}: got {shorten(text)}, expected valid Unicode"
        raise RowError("invalid_custom_id", reason, name) from None
    return text


def _openai_request(
    custom_id: str, record: Mapping[str, Any], defaults: BatchDefaults
) -> BatchRequest:
    method, url, body = (_present(record, name) for name in ("method", "url", "body"))
    for name, value in (("method", method), ("url", url)):
        if not isinstance(value, str):
            raise _wrong_type(name, value, "a text")
    if not isinstance(body, dict):
        raise _wrong_type("body", body, "an object")
    if method.upper() != "POST":
        reason = f"method: got {shorten(method)}, expected POST"
        raise RowError("invalid_method", reason, "method")
    if url not in (COMPLETIONS, CHAT):
        reason = f"url: got {shorten(url)}, expected {COMPLETIONS} or {CHAT}"
        raise RowError("unknown_url", reason, "url")
    if url == CHAT:
        _check_messages(body.get("messages"), "body.messages")
    else:
        _check_prompt(body.get("prompt"), "body.prompt", or_texts=True)
    return BatchRequest(custom_id, url, _body(custom_id, body, defaults), None)


def _plain_request(custom_id: str, record: dict[str, Any], defaults: BatchDefaults) -> BatchRequest:
    column = defaults.prompt_column
    prompt = record.get(column)
    if prompt is None and record.get("messages") is not None:
        column, prompt = "messages", record["messages"]
    if column == "messages" or (isinstance(prompt, list) and prompt and _are(prompt, dict)):
        _check_messages(prompt, column)
        body = _body(custom_id, {"messages": prompt}, defaults)
        return BatchRequest(custom_id, CHAT, body, record)
    _check_prompt(prompt, column, or_texts=False)
    return BatchRequest(
        custom_id, COMPLETIONS, _body(custom_id, {"prompt": prompt}, defaults), record
    )


def _body(custom_id: str, own: Mapping[str, Any], defaults: BatchDefaults) -> dict[str, Any]:
    body = {**defaults.body, **own}
    stream = body.pop("stream", None)
    if not isinstance(stream, bool | None):
        raise _wrong_type("body.stream", stream, "false")
    if stream:
        raise RowError(
            "stream_not_supported", "body.stream: got True, expected false", "body.stream"
        )
    if body.get("seed") is None:
        body["seed"] = row_seed(defaults.seed, custom_id)
    return body


def _present(record: Mapping[str, Any], name: str) -> Any:
    value = record.get(name)
    if value is None:
        raise RowError(f"missing_{name}", f"{name}: is missing", name)
    return value


def _check_prompt(prompt: Any, name: str, *, or_texts: bool) -> None:
    if prompt is None:
        raise RowError("missing_prompt", f"{name}: is missing", name)
    if prompt in ("", []):
        raise RowError("empty_prompt", f"{name}: is empty", name)
    # Several prompts of one row, and what is wrong within them, are left to the service.
    fits = isinstance(prompt, str) or (isinstance(prompt, list) and (or_texts or _are(prompt, int)))
    if not fits:
        raise _wrong_type(name, prompt, "a text or a list of token ids")


def _check_messages(messages: Any, name: str) -> None:
    if messages is None:
        raise RowError("missing_messages", f"{name}: is missing", name)
    if not isinstance(messages, list) or not _are(messages, dict):
        raise _wrong_type(name, messages, "a list of messages")
    if not messages:
        raise RowError("empty_messages", f"{name}: is empty", name)


def _are(values: list[Any], kind: type) -> bool:
    return all(isinstance(value, kind) and not isinstance(value, bool) for value in values)


def _wrong_type(name: str, value: Any, expected: str) -> RowError:
    return RowError("invalid_type", f"{name}: got {shorten(value)}, expected {expected}", name)
