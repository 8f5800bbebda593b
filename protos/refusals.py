"""Texts of refusals that a client reads: they travel as a status's details.

Metadata would be the better place, but Serve's proxy loses it where a call ends with an error.
"""

from __future__ import annotations

import re

import grpc

from twotower.towers.errors import InvalidRequestError

OWN = "twotower: "
INTERNAL_TEXT = "internal error; the server's log has it under request"
NUMERICAL_TEXT = "numerical error"
RETRY_AFTER_S = 1.0
BUSY_TEXT = f"too many requests are waiting; retry after {RETRY_AFTER_S:g} s"
LOST_TEXT = "the process that held the request is gone; try again"
_RETRY_AFTER = re.compile(r"; retry after (\d+(?:\.\d+)?) s$")
_TOO_LONG = re.compile(r"essage larger than max \((\d+) vs\. (\d+)\)")
# Ray's reports of an actor that has died, its traces, and Python's of an exception.
_PLATFORM = re.compile(
    r"The actor (?:died|is dead|\w+ is unavailable|is unavailable)|class_name: |actor_id[:=]|"
    r"ActorID|ray::|\bray\.\w+|Traceback \(most|Unexpected <class"
)
# What Serve itself says with these codes; with any other one something has broken.
_FOREIGN = {
    grpc.StatusCode.OK: (grpc.StatusCode.OK, ""),
    grpc.StatusCode.CANCELLED: (grpc.StatusCode.CANCELLED, "the call was cancelled"),
    grpc.StatusCode.DEADLINE_EXCEEDED: (
        grpc.StatusCode.DEADLINE_EXCEEDED,
        "the call took longer than the service lets one take",
    ),
    grpc.StatusCode.NOT_FOUND: (grpc.StatusCode.UNAVAILABLE, "the service is not up"),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (grpc.StatusCode.RESOURCE_EXHAUSTED, BUSY_TEXT),
    grpc.StatusCode.UNAVAILABLE: (
        grpc.StatusCode.UNAVAILABLE,
        "the service is not up; try again later",
    ),
}


class RequestRefusedError(Exception):
    """Ends a call whose status has been set; carries its code's name and nothing of the request.

    It lives here because Serve's proxies read it, and import what its module imports: with torch in
    it the first refusal stopped all streams of a proxy for the better part of a second.
    """


def with_retry_after(text: str, seconds: float) -> str:
    """The text of a refusal that waiting may cure, with a hint how long."""
    return f"{text}; retry after {seconds:g} s"


def retry_after_of(details: str) -> float | None:
    """The hint in a refusal's text, in seconds, if it has one."""
    found = _RETRY_AFTER.search(details)
    return float(found.group(1)) if found else None


def too_long(size: int, limit: int) -> InvalidRequestError:
    """The refusal of a message that is too long."""
    return InvalidRequestError("message", size, f"at most {limit} bytes")


def marked(details: str) -> str:
    """A text that was made for clients, marked as such for the way through Serve's proxy."""
    return f"{OWN}{details}"


def shown(code: grpc.StatusCode, details: str) -> tuple[grpc.StatusCode, str]:
    """Code and text of a status for a client: a marked text as it was made, of all others none.

    Serve's proxy fills in an exception's text where none was set; of a replica that has died it
    names class, actor, process, namespace and address.
    """
    if details.startswith(OWN):
        return code, details.removeprefix(OWN)
    return _FOREIGN.get(code, (grpc.StatusCode.UNAVAILABLE, LOST_TEXT))


def client_status(code: grpc.StatusCode, details: str) -> tuple[grpc.StatusCode, str]:
    """Code and text that a client shows for a status that it has received.

    A service that is not behind this package's own proxies may name its processes, and gRPC calls a
    message that is too long a lack of resources, which waiting would cure.
    """
    found = _TOO_LONG.search(details)
    if found is not None and code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        size, limit = map(int, found.groups())
        return grpc.StatusCode.INVALID_ARGUMENT, str(too_long(size, limit))
    # A text of this package may name a request, whose name may be anything.
    ours = code == grpc.StatusCode.INVALID_ARGUMENT or is_own_internal(details)
    if not ours and _PLATFORM.search(details):
        return grpc.StatusCode.UNAVAILABLE, LOST_TEXT
    return code, details


def is_lost(details: str) -> bool:
    """True if a status says that a server process has gone while it held the request."""
    return details == LOST_TEXT


def is_own_internal(details: str) -> bool:
    """True if the service itself has failed a request as INTERNAL.

    Otherwise the process that held it has gone: Serve's proxy reports that with the same code.
    """
    return details.startswith((INTERNAL_TEXT, NUMERICAL_TEXT))
