"""Names that go with a request through all services: its id, and the trace that it is part of.

`traceparent` is W3C Trace Context, version 00 (https://www.w3.org/TR/trace-context/): a trace of 16
bytes, the caller's span of 8, flags of 1, all in lower-case hexadecimal digits.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable

REQUEST_ID = "x-request-id"
TRACE_PARENT = "traceparent"
# Names with zeros only are invalid.
_FORM = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


def trace_parent_of(given: Iterable[str]) -> str:
    """The caller's `traceparent`, out of all headers of that name; a drawn one, not sampled, if
    there is none, more than one or one of another form."""
    headers = list(given)
    if len(headers) == 1 and _FORM.fullmatch(headers[0]):
        return headers[0]
    return f"00-{_drawn(16)}-{_drawn(8)}-00"


def given_trace(given: Iterable[str]) -> str | None:
    """The caller's `traceparent` out of all headers of that name, None without a valid one."""
    headers = list(given)
    found = trace_parent_of(headers)
    return found if found in headers else None


def trace_id_of(trace_parent: str) -> str:
    """The trace in a valid `traceparent`, 32 digits. Raises ValueError for an invalid one."""
    found = _FORM.fullmatch(trace_parent)
    if found is None:
        raise ValueError(f"traceparent: got {trace_parent!r}, expected 00-TRACE-SPAN-FLAGS")
    return found.group(1)


def _drawn(count: int) -> str:
    """So many random bytes, not all of them zero."""
    value = 0
    while not value:
        value = secrets.randbits(8 * count)
    return f"{value:0{2 * count}x}"
