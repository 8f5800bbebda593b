"""The router's own ASGI layer around all routes: a request's name, its caller, its size and its
errors."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders

import twotower
from twotower.deployments.access.access import Access, Caller
from twotower.deployments.access.pages import check_page
from twotower.deployments.completions.requests import request_id_of
from twotower.deployments.http.errors import error_response
from twotower.deployments.http.middleware import MARK, App, Message, Receive, Scope, Send, bounded
from twotower.deployments.telemetry.logs import REQUEST_ID
from twotower.protos.trace_context import TRACE_PARENT, given_trace
from twotower.towers.errors import InvalidRequestError

# For everyone: the page, which has nothing of anybody, and probes. All other paths need a caller.
OPEN_PATHS = frozenset({"/", "/health", "/ready", "/version", "/openapi.json"})
OPEN_FOLDER = "/page/"
# For administrators.
ADMIN_PATHS = ("/admin", "/metrics")


class Front:
    """Names each request, finds out who calls before anything is read, bounds the body and turns
    what a route raises into an answer."""

    def __init__(
        self, app: App, access: Access, cors_origins: Sequence[str], max_bytes: int
    ) -> None:
        self._app = app
        self._access = access
        self._origins = cors_origins
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, state = Headers(scope=scope), scope.setdefault("state", {})
        state["request_id"] = request_id = _request_id(headers.get("x-request-id", ""))
        state["traceparent"] = trace = given_trace(headers.getlist(TRACE_PARENT))
        REQUEST_ID.set(request_id)
        started = False

        async def marked(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                answer = MutableHeaders(scope=message)
                answer.append(MARK, twotower.__version__)
                if trace is not None:
                    answer.append(TRACE_PARENT, trace)
            await send(message)

        try:
            path = str(scope["path"])
            if path not in OPEN_PATHS and not path.startswith(OPEN_FOLDER):
                state["caller"] = self._caller(scope, headers, path)
            await self._app(scope, bounded(receive, self._max_bytes), marked)
        except Exception as error:
            if started:
                raise
            await error_response(error, request_id)(scope, receive, marked)

    def _caller(self, scope: Scope, headers: Headers, path: str) -> Caller:
        """Who calls. Raises UnauthenticatedError, and ForbiddenError if only admins may, or if it
        is another site's page."""
        peer = scope["client"][0] if scope.get("client") else None
        forwarded = "x-forwarded-for" in headers
        caller = self._access.caller(headers.get("authorization"), peer, forwarded=forwarded)
        check_page(caller, headers.get("origin"), headers.get("host"), self._origins)
        if path.startswith(ADMIN_PATHS):
            caller.check_admin()
        return caller


def _request_id(given: str) -> str:
    """The client's name for the request, or a drawn one in place of none or an invalid one."""
    try:
        return request_id_of(given)
    except InvalidRequestError:
        return secrets.token_hex(8)
