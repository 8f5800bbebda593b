"""What one HTTP response of a service says."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp

from twotower.towers.errors import cut_off

# States that pass; any other status than 200 stays what it is.
TRANSIENT = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_MOST_OF_A_TEXT = 200


@dataclass(frozen=True)
class Reply:
    """A response, or what came in its place: `unreached` if no connection was made, `lost` if it
    broke or took too long. `bad_answer` is a response of status 200 that is no completion."""

    status: int
    body: dict[str, Any]
    request_id: str = ""
    retry_after_s: float | None = None
    bad_answer: bool = False
    unreached: bool = False
    lost: bool = False

    @property
    def ok(self) -> bool:
        """True for a completion."""
        return self.status == 200 and not (self.bad_answer or self.unreached or self.lost)


def read_reply(response: aiohttp.ClientResponse, content: bytes) -> Reply:
    """The reply in a response whose body is `content`."""
    status, given = response.status, _parsed(content)
    name = response.headers.get("x-request-id", "")
    if status == 200:
        bad = not (isinstance(given, dict) and given.get("choices"))
        body = error_body(200, _what_is_wrong(given)) if bad else given
        return Reply(status, body, name, bad_answer=bad)
    wait = retry_after_s(response.headers.get("retry-after"))
    error = given.get("error") if isinstance(given, dict) else None
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        return Reply(status, {"error": {**_EMPTY, **error}}, name, wait)
    text = content[: 4 * _MOST_OF_A_TEXT].decode(errors="replace").strip()
    said = cut_off(text, _MOST_OF_A_TEXT) or response.reason or "no text"
    return Reply(status, error_body(status, said), name, wait)


def error_body(status: int, message: str) -> dict[str, Any]:
    """OpenAI's error object for what the service did not say in that shape."""
    kind, code = _NAMES.get(status, ("server_error", None))
    if 400 <= status < 500:
        kind = "invalid_request_error"
    return {"error": {**_EMPTY, "message": message, "type": kind, "code": code}}


def retry_after_s(header: str | None) -> float | None:
    """Seconds of a Retry-After header, which has a number of them or a date; None without one."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        return _until(header)
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _until(date: str) -> float | None:
    try:
        then = parsedate_to_datetime(date)
    except ValueError:
        return None
    then = then if then.tzinfo else then.replace(tzinfo=UTC)
    return max(0.0, (then - datetime.now(UTC)).total_seconds())


_EMPTY: Mapping[str, Any] = {"message": "", "type": "server_error", "param": None, "code": None}
_NAMES: dict[int, tuple[str, str | None]] = {
    0: ("connection_error", "unreachable"),
    200: ("server_error", "bad_answer"),
}


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None


def _what_is_wrong(given: Any) -> str:
    if isinstance(given, dict):
        return "the service answered with status 200 and no choices"
    return "the service answered with status 200 and a body that is not a JSON object"
