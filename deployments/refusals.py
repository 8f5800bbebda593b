"""Texts of refusals that a client reads: they travel as a status's details.

Metadata would be the better place, but Serve's proxy loses it where a call ends with an error.
"""

from __future__ import annotations

import re

INTERNAL_TEXT = "internal error; the server's log has it under request"
NUMERICAL_TEXT = "numerical error"
RETRY_AFTER_S = 1.0
_RETRY_AFTER = re.compile(r"; retry after (\d+(?:\.\d+)?) s$")


def with_retry_after(text: str, seconds: float) -> str:
    """The text of a refusal that waiting may cure, with a hint how long."""
    return f"{text}; retry after {seconds:g} s"


def retry_after_of(details: str) -> float | None:
    """The hint in a refusal's text, in seconds, if it has one."""
    found = _RETRY_AFTER.search(details)
    return float(found.group(1)) if found else None


def is_own_internal(details: str) -> bool:
    """Whether the service itself has failed a request as INTERNAL.

    Otherwise the process that held it has gone: Serve's proxy reports that with the same code.
    """
    return details.startswith((INTERNAL_TEXT, NUMERICAL_TEXT))
