"""Calls of a process that have to return in time, or the process is ended."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from twotower.towers.errors import UnavailableError

logger = logging.getLogger(__name__)

# A tower that does not answer within this time hangs.
ANSWER_TIMEOUT_S = 5.0
# A busy machine may stop a process for a while.
CHANCES = 2
T = TypeVar("T")


class Watch:
    """Ends a process that has answered nothing for `CHANCES` answers' time.

    Calls of a process that hangs would wait as long as it does: once it has ended, its rows are
    lost at once and go on elsewhere.
    """

    def __init__(self, end: Callable[[], None], answer_timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        self._end = end
        self._answer_timeout = answer_timeout_s
        self._silent_since: float | None = None

    async def answer(self, asked: Awaitable[T]) -> T:
        """The result of a call. Raises UnavailableError if it does not come in time."""
        asked_at = time.monotonic()
        try:
            async with asyncio.timeout(self._answer_timeout):
                answer = await asked
        except TimeoutError:
            # Of questions that are asked together none counts twice.
            self._silent_since = min(self._silent_since or asked_at, asked_at)
            if time.monotonic() - self._silent_since >= CHANCES * self._answer_timeout:
                logger.warning("a tower hangs and is ended")
                self._end()
            raise UnavailableError("a tower does not answer; try again") from None
        self._silent_since = None
        return answer
