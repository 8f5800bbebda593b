"""How long an attempt waits for its pair: while one may answer, and no other has room for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import TypeVar

# How often a row that waits looks for a pair that has room.
LOOK_S = 1.0
LEAST_WAIT_S = 0.05
T = TypeVar("T")


class Patience:
    """Awaits the answers of one attempt, one at a time, within a `with` block.

    Serve itself waits for a pair without an end, and a stream does for one whose machine is lost
    without a word. While an answer is awaited, `look` may raise to end the wait, every LOOK_S, and
    so may `check`, every `period_s` of one wait. A timer looks, and an answer that comes in time
    costs nothing beside itself.
    """

    def __init__(
        self,
        check: Callable[[], Awaitable[None]],
        period_s: float,
        look: Callable[[], None] = lambda: None,
    ) -> None:
        self._check = check
        self._period = max(period_s, LEAST_WAIT_S)
        self._look = look
        self._limit: asyncio.Timeout | None = None
        self._error: Exception | None = None
        self._check_at = 0.0
        self._checking: asyncio.Task[None] | None = None

    def __enter__(self) -> Patience:
        self._loop = asyncio.get_running_loop()
        self._later()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._timer.cancel()
        if self._checking is not None:
            self._checking.cancel()

    async def wait(self, answer: Awaitable[T]) -> T:
        """The answer. Raises what `look` and `check` raise."""
        self._check_at = self._loop.time() + self._period
        self._error = None
        try:
            async with asyncio.timeout(None) as self._limit:
                found = await answer
            if self._error is not None:
                # What ended the wait came with the answer: it has been acted on, as by a move.
                raise self._error
            return found
        except TimeoutError:
            if self._error is None:
                raise
            raise self._error from None
        finally:
            self._limit = None

    def _later(self) -> None:
        self._timer = self._loop.call_later(min(LOOK_S, self._period), self._tick)

    def _tick(self) -> None:
        self._later()
        if self._limit is None:
            return
        try:
            self._look()
        except Exception as error:
            self._end(self._limit, error)
            return
        if self._checking is None and self._loop.time() >= self._check_at:
            self._checking = self._loop.create_task(self._checked(self._limit))

    async def _checked(self, limit: asyncio.Timeout) -> None:
        try:
            await self._check()
        except Exception as error:
            self._end(limit, error)
        finally:
            self._checking = None
            self._check_at = self._loop.time() + self._period

    def _end(self, limit: asyncio.Timeout, error: Exception) -> None:
        """Ends the wait, unless the answer has come and another is awaited."""
        if limit is self._limit and self._error is None:
            self._error = error
            limit.reschedule(self._loop.time())
