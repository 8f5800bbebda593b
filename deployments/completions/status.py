"""From an exception to a gRPC status, once, for every method of the service.

What a client reads is either an error from the package's own tree, whose text is made for it, or
one fixed sentence. Anything else stays in the server's log.
"""

from __future__ import annotations

import logging
from typing import Any, NoReturn

import grpc
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from twotower.cluster.services.ray_errors import plain_error
from twotower.deployments.access.errors import (
    ForbiddenError,
    RateLimitError,
    UnauthenticatedError,
)
from twotower.deployments.completions.requests import NotServedError
from twotower.deployments.routing.retry import LostTooOftenError
from twotower.deployments.telemetry.errors import ERROR_ANSWERS
from twotower.deployments.telemetry.logs import REQUEST_ID
from twotower.protos.refusals import (
    BUSY_TEXT,
    INTERNAL_TEXT,
    NUMERICAL_TEXT,
    RETRY_AFTER_S,
    RequestRefusedError,
    marked,
    with_retry_after,
)
from twotower.towers.errors import (
    CapacityError,
    InvalidRequestError,
    NumericalError,
    QueueFullError,
    UnavailableError,
)

logger = logging.getLogger("ray.serve")

MAX_DETAILS = 1024
_STARTING_TEXT = "no pair of towers is up; try again later"
_SHOWN: tuple[tuple[type[Exception], grpc.StatusCode], ...] = (
    (NotServedError, grpc.StatusCode.NOT_FOUND),
    (InvalidRequestError, grpc.StatusCode.INVALID_ARGUMENT),
    (UnauthenticatedError, grpc.StatusCode.UNAUTHENTICATED),
    (ForbiddenError, grpc.StatusCode.PERMISSION_DENIED),
    (CapacityError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (UnavailableError, grpc.StatusCode.UNAVAILABLE),
    (LostTooOftenError, grpc.StatusCode.ABORTED),
    (NumericalError, grpc.StatusCode.INTERNAL),
)
_FIXED: tuple[tuple[type[BaseException], grpc.StatusCode, str], ...] = (
    (BackPressureError, grpc.StatusCode.RESOURCE_EXHAUSTED, BUSY_TEXT),
    (DeploymentUnavailableError, grpc.StatusCode.UNAVAILABLE, _STARTING_TEXT),
    (TimeoutError, grpc.StatusCode.UNAVAILABLE, "a tower did not answer in time; try again"),
)


def status_of(error: BaseException, request_id: str) -> tuple[grpc.StatusCode, str]:
    """Code and details for an error; details name a field or say what to do, never a place."""
    plain = plain_error(error)
    for kind, code in _SHOWN:
        if isinstance(plain, kind):
            return code, _shown(plain)
    for fixed, code, text in _FIXED:
        if isinstance(plain, fixed):
            return code, text
    return grpc.StatusCode.INTERNAL, f"{INTERNAL_TEXT} {request_id}"


def status_name(error: BaseException) -> str:
    """The name of the gRPC status for an error."""
    return status_of(error, "")[0].name


def _shown(error: BaseException) -> str:
    text = str(error)[:MAX_DETAILS]
    if isinstance(error, NumericalError):
        return f"{NUMERICAL_TEXT}: {text}"
    if isinstance(error, RateLimitError):
        return with_retry_after(text, error.retry_after_s)
    return with_retry_after(text, RETRY_AFTER_S) if isinstance(error, QueueFullError) else text


def error_answer(error: BaseException, request_id: str) -> tuple[grpc.StatusCode, str]:
    """As `status_of`, for an error that a client is told of now: it is counted, and one that the
    client learns nothing of is logged."""
    code, details = status_of(error, request_id)
    ERROR_ANSWERS.note(code.name)
    if details.startswith(INTERNAL_TEXT):
        logger.error("request %s failed", request_id, exc_info=error)
    return code, details


def refuse(context: Any, error: BaseException, request_id: str) -> NoReturn:
    """Sets the status of a Serve gRPC call and ends it."""
    REQUEST_ID.set(request_id)
    code, details = error_answer(error, request_id)
    context.set_code(code)
    context.set_details(marked(details))
    # Serve writes this error into its log, and the details may repeat a part of the prompt.
    raise RequestRefusedError(code.name) from None
