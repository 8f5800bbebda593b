"""The context of a call inside Serve's proxy: what its router and its client may see."""

from __future__ import annotations

import logging
from typing import Any

import grpc

from twotower.deployments.completions.requests import request_id_of
from twotower.protos.incoming import Refusal
from twotower.protos.refusals import LOST_TEXT, marked, shown
from twotower.protos.trace_context import REQUEST_ID, TRACE_PARENT, given_trace
from twotower.towers.errors import InvalidRequestError

logger = logging.getLogger("ray.serve")

_CODES = {code.value[0]: code for code in grpc.StatusCode}
# Where messages have a request's name: ours, KServe's.
_NAMES = ("request_id", "id")


class CallContext:
    """A call's context that outlives the call: the peer's names are read while there is one.

    Its status says what was made for clients and nothing else. Its metadata name the request and
    its trace. `refusal` says why `request` must not reach a handler, if it must not.
    """

    def __init__(self, context: Any, request: Any) -> None:
        self._context = context
        self._peer = context.peer()
        self._peer_identities = context.peer_identities()
        self._auth_context = context.auth_context()
        self._over = False
        context.add_done_callback(self._end)
        given = tuple(context.invocation_metadata() or ())
        self.refusal = request if isinstance(request, Refusal) else None
        self._names = [(REQUEST_ID, self._request_id(_values(given, REQUEST_ID)))]
        trace = given_trace(_values(given, TRACE_PARENT))
        if trace is not None:
            self._names.append((TRACE_PARENT, trace))
        others = [pair for pair in given if pair[0] not in (REQUEST_ID, TRACE_PARENT)]
        self._metadata = (*others, *self._names)
        self._shown = _shown_names(self._names, request)
        self._sent = False

    def peer(self) -> Any:
        """The client's address."""
        return self._peer

    def peer_identities(self) -> Any:
        """The client's identities, if it has shown a certificate."""
        return self._peer_identities

    def auth_context(self) -> Any:
        """The transport's properties of the client."""
        return self._auth_context

    def invocation_metadata(self) -> tuple[tuple[str, Any], ...]:
        """The client's metadata, with a valid name of the request in any case, and its trace if the
        client has given a valid one."""
        return self._metadata

    async def send_names(self) -> None:
        """Sends name and trace ahead of the first message or the status; once."""
        if self._sent or self._over:
            return
        self._sent = True
        await self._context.send_initial_metadata(self._shown)

    def set_details(self, details: str) -> None:
        """Sets the text of the status, whose code has been set, to what a client may read."""
        given = self._context.code()
        known = given if isinstance(given, grpc.StatusCode) else _CODES[int(given or 0)]
        code, text = shown(known, details)
        self._context.set_code(code)
        self._context.set_details(text)

    def refuse(self, refusal: Refusal) -> None:
        """Ends the call, when its handler does, as one whose message was not taken."""
        self.end(grpc.StatusCode.INVALID_ARGUMENT, refusal.details)

    def fail(self, error: Exception) -> None:
        """Ends the call as lost by an error here, which only the log names."""
        logger.error("a call failed in the proxy", exc_info=error)
        self.end(grpc.StatusCode.UNAVAILABLE, LOST_TEXT)

    def end(self, code: grpc.StatusCode, details: str) -> None:
        """Sets a status whose text was made for clients."""
        self._context.set_code(code)
        self.set_details(marked(details))

    def _end(self, _: Any) -> None:
        self._over = True

    def _request_id(self, given: list[str]) -> str:
        """The client's name for the request, or a drawn one; an invalid one is a refusal."""
        try:
            return request_id_of(given[-1] if given else "", REQUEST_ID)
        except InvalidRequestError as error:
            self.refusal = self.refusal or Refusal(str(error))
            return request_id_of("")

    def __getattr__(self, name: str) -> Any:
        # All else lives in Python and may be used after the call has ended.
        return getattr(self._context, name)


def _values(metadata: tuple[tuple[str, Any], ...], name: str) -> list[str]:
    return [value for key, value in metadata if key == name]


def _shown_names(names: list[tuple[str, str]], request: Any) -> tuple[tuple[str, str], ...]:
    """The names as the client reads them: the message's own name goes before that of metadata, as
    it does in the router, which refuses an invalid one."""
    given = next((value for name in _NAMES if (value := getattr(request, name, ""))), "")
    try:
        return (REQUEST_ID, request_id_of(given or names[0][1])), *names[1:]
    except InvalidRequestError:
        return tuple(names)
