"""What a gRPC call brings beside its message: who calls, the request's name and
its trace."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from twotower.deployments.access.access import Access, Caller
from twotower.deployments.completions.requests import request_id_of
from twotower.deployments.completions.status import refuse
from twotower.protos.trace_context import REQUEST_ID, TRACE_PARENT
from twotower.towers.errors import InvalidRequestError


def caller_of(access: Access, grpc_context: Any) -> Caller:
    """Who calls. Raises UnauthenticatedError."""
    metadata = dict(grpc_context.invocation_metadata())
    forwarded = "x-forwarded-for" in metadata
    return access.caller(metadata.get("authorization"), grpc_context.peer(), forwarded=forwarded)


def request_name(grpc_context: Any, given: str = "") -> str:
    """The name of a request: the message's, not checked, else that of the call's metadata, which
    the proxy has drawn if need be."""
    return given or dict(grpc_context.invocation_metadata()).get(REQUEST_ID) or request_id_of("")


def trace_parent(grpc_context: Any) -> str | None:
    """The client's `traceparent`, None if it has given no valid one."""
    found: str | None = dict(grpc_context.invocation_metadata()).get(TRACE_PARENT)
    return found


def log_name(grpc_context: Any, given: str = "") -> str:
    """A name for the log, made before the request is known to be valid."""
    try:
        return request_id_of(request_name(grpc_context, given))
    except InvalidRequestError:
        return "(invalid request_id)"


class Refusing:
    """Around what a call does: an error ends it with the status that is made for clients.

    `given` is the name of the request, as in `log_name`.
    """

    def __init__(self, grpc_context: Any, given: str = "") -> None:
        self._context = grpc_context
        self._given = given

    def __enter__(self) -> None:
        """Does nothing: what counts is the end."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # The end of a stream that its reader leaves is no error.
        if isinstance(error, Exception):
            refuse(self._context, error, log_name(self._context, self._given))
