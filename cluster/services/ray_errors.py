"""Errors of remote calls as user code raised them, and calls that outlive a cancelled request."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable
from typing import TypeVar

from ray.exceptions import RayActorError, RayTaskError

from twotower.towers.errors import UnavailableError

T = TypeVar("T")


def plain_error(error: BaseException) -> BaseException:
    """The error that user code raised, without Ray's wrapping; a dead actor is UnavailableError."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        return plain_error(cause) if isinstance(cause, BaseException) else error
    if isinstance(error, RayActorError):
        return UnavailableError("a tower or replica that held the request is gone; try again")
    return error


async def plainly(call: Awaitable[T]) -> T:
    """Awaits a remote call and raises its error as `plain_error`."""
    try:
        return await call
    except (RayTaskError, RayActorError) as error:
        raise plain_error(error) from None


async def detached(call: Callable[[], Awaitable[T]]) -> T:
    """Makes a remote call that the cancellation of the present request does not reach.

    Ray cancels what a cancelled task has called, found by a context variable: an empty context
    has none. Without this a release that was asked for in a `finally` may never run.
    """

    async def run() -> T:
        return await plainly(call())

    return await asyncio.create_task(run(), context=contextvars.Context())
