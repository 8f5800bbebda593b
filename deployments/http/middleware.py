"""ASGI middleware around the HTTP front: in the router around all routes, and in Serve's proxy.

The proxy reads a body as it comes, whatever becomes of it, and answers for a router that has died
with that one's class and address. `proxy_middlewares` is what a proxy process runs in front of
that: Serve finds it by the name in `PROXY_VARIABLE`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import JSONResponse

from twotower.protos.incoming import longest_body, message_limit
from twotower.protos.refusals import LOST_TEXT, too_long

PROXY_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
PROXY_CALLBACK = "twotower.deployments.http.middleware.proxy_middlewares"
# Says that an answer was made by the router.
MARK = "x-twotower-version"
# Of a request line's target.
MAX_TARGET = 4096
# Paths that Serve's proxy answers itself.
_PROBES = ("/-/healthz", "/-/routes")
_REQUEST_ID = re.compile(r"[!-~]{1,128}")
# By these a client would tell Serve's proxy what to do: not to notice that it has gone, to end its
# own request, to keep a session.
_FOR_THE_PROXY = (
    b"x-request-disconnect-disabled",
    b"x-request-timeout-seconds",
    b"serve_multiplexed_model_id",
    b"x-session-id",
)
_NAME = b"x-request-id"

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


def proxy_middlewares() -> list[Middleware]:
    """The middleware of a proxy process; its limit follows from that of gRPC messages."""
    return [Middleware(GuardedProxy, max_bytes=longest_body(message_limit(os.environ)))]


class GuardedProxy:
    """Refuses bodies that are too long before they are read, and answers in the service's own words
    where Serve would in its own."""

    def __init__(self, app: App, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            # No route takes a websocket.
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1000})
                return
            await self._app(scope, receive, send)
            return
        scope["headers"] = _kept(scope["headers"])
        length = Headers(scope=scope).get("content-length", "0")
        target = len(scope.get("raw_path") or b"") + len(scope.get("query_string") or b"")
        if target > MAX_TARGET:
            await _refusal(414, "the path is too long")(scope, receive, send)
        elif length.isdecimal() and int(length[:20]) > self._max_bytes:
            text = str(too_long(int(length[:20]), self._max_bytes))
            await _refusal(413, text)(scope, receive, send)
        else:
            answer = _ProxyAnswer(scope, send)
            await self._app(scope, answer.bounded(receive, self._max_bytes), answer.send)


class _ProxyAnswer:
    """The answer to one request in a proxy: what the router or Serve's own probes have made is
    passed on, everything else replaced."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope = scope
        self._send = send
        self._own = str(scope["path"]) in _PROBES
        self._replaced = self._started = False

    async def send(self, message: Message) -> None:
        """Takes a message of the app."""
        if message["type"] == "http.response.start" and not self._replaced:
            marked = MARK in Headers(raw=list(message.get("headers", ())))
            if not (self._own or marked):
                await self._replace(*_in_own_words(message["status"]))
            self._started = True
        if not self._replaced:
            await self._send(message)

    def bounded(self, receive: Receive, max_bytes: int) -> Receive:
        """`receive` of a body of at most `max_bytes`: one that is longer is refused, and for the
        app its client has gone."""
        taken = 0

        async def receive_bounded() -> Message:
            nonlocal taken
            message = {"type": "http.disconnect"} if taken > max_bytes else await receive()
            taken += len(message.get("body", b""))
            if taken <= max_bytes:
                return message
            if not self._started and not self._replaced:
                await self._replace(413, str(too_long(taken, max_bytes)))
            return {"type": "http.disconnect"}

        return receive_bounded

    async def _replace(self, status: int, text: str) -> None:
        self._replaced = True
        await _refusal(status, text)(self._scope, _nothing, self._send)


def bounded(receive: Receive, max_bytes: int) -> Receive:
    """`receive` of a body of at most `max_bytes`; raises HTTPException 413 beyond."""
    taken = 0

    async def receive_bounded() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > max_bytes:
            raise HTTPException(413, str(too_long(taken, max_bytes)))
        return message

    return receive_bounded


def _kept(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Headers without those for the proxy, and without a request's name that is none."""
    kept = [(name, value) for name, value in headers if name.lower() not in _FOR_THE_PROXY]
    names = [value for name, value in kept if name.lower() == _NAME]
    if names and (len(names) > 1 or not _REQUEST_ID.fullmatch(names[0].decode("latin-1"))):
        kept = [(name, value) for name, value in kept if name.lower() != _NAME]
    return kept


def _in_own_words(status: int) -> tuple[int, str]:
    if status == 404:
        return 404, "no such path"
    if status == 408:
        return 503, "the request took longer than the service lets one take"
    return 503, LOST_TEXT


def _refusal(status: int, text: str) -> JSONResponse:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    error = {"message": text, "type": kind, "param": None, "code": None}
    return JSONResponse({"error": error}, status, {"connection": "close"} if status == 413 else {})


async def _nothing() -> Message:
    return {"type": "http.disconnect"}
