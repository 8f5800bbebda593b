"""Outermost of the router's own ASGI layers: the request's name, its size, and its errors."""

from __future__ import annotations

import secrets

from starlette.datastructures import Headers, MutableHeaders

import twotower
from twotower.deployments.completions.requests import request_id_of
from twotower.deployments.http.errors import error_response
from twotower.deployments.http.middleware import MARK, App, Message, Receive, Scope, Send, bounded
from twotower.towers.errors import InvalidRequestError


class Front:
    """Names each request, bounds its body and turns what its route raises into an answer."""

    def __init__(self, app: App, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope).get("x-request-id", ""))
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def marked(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message).append(MARK, twotower.__version__)
            await send(message)

        try:
            await self._app(scope, bounded(receive, self._max_bytes), marked)
        except Exception as error:
            if started:
                raise
            await error_response(error, request_id)(scope, receive, marked)


def _request_id(given: str) -> str:
    """The client's name for the request, or a drawn one in place of none or an invalid one."""
    try:
        return request_id_of(given)
    except InvalidRequestError:
        return secrets.token_hex(8)
