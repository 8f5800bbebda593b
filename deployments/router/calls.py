"""What a gRPC call brings beside its message: who calls, the request's name and
its trace."""

from __future__ import annotations

from typing import Any

from twotower.deployments.access.access import Access, Caller
from twotower.deployments.completions.requests import request_id_of
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
