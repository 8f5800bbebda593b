"""Names that go with a request through all services: its id, and the trace that it is part of.

`traceparent` is W3C Trace Context, version 00 (https://www.w3.org/TR/trace-context/): a trace of 16
bytes, the caller's span of 8, flags of 1, all in lower-case hexadecimal digits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

REQUEST_ID = "x-request-id"
TRACE_PARENT = "traceparent"
# Names with zeros only are invalid.
_FORM = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


def given_trace(given: Iterable[str]) -> str | None:
    """The caller's `traceparent`, out of all headers of that name; None if there is none, more than
    one or one of another form, as if the caller had given none."""
    headers = list(given)
    return headers[0] if len(headers) == 1 and _FORM.fullmatch(headers[0]) else None
