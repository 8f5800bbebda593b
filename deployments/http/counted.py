"""Bodies of a great many lists and objects are refused before they are parsed.

Each of them is an object of Python's that its garbage collector looks at again and again: seven
megabytes of empty lists held up a router, and all its streams, for three seconds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from twotower.towers.errors import InvalidRequestError

# A conversation has a few for each message, and a message has at least a token.
MAX_CONTAINERS = 1 << 16
# One without an end goes to the body's end: otherwise each of its quotes would begin another.
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"?', re.DOTALL)


class CountedRoute(APIRoute):
    """A route that looks at a body before FastAPI parses it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See FastAPI."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            check_containers(await request.body())
            return await handler(request)

        return handle


def check_containers(raw: bytes) -> None:
    """Raises InvalidRequestError for more lists and objects than a body may have."""
    if _openings(raw) <= MAX_CONTAINERS:
        return
    # Those in texts are none.
    count = _openings(_STRING.sub(b"", raw))
    if count > MAX_CONTAINERS:
        found = f"{count} lists and objects"
        raise InvalidRequestError("body", found, f"at most {MAX_CONTAINERS} lists and objects")


def _openings(raw: bytes) -> int:
    return raw.count(b"[") + raw.count(b"{")
