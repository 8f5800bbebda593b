"""How many requests may be on their way: fewer after a refusal, slowly more after answers."""

from __future__ import annotations

import asyncio
from collections import deque


class Places:
    """Places for requests in flight: additive increase, multiplicative decrease.

    There are `most` of them to begin with. A refusal halves their number, down to 1; as many
    answers in a row as there are places give one more, up to `most`. Belongs to one event loop.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._limit = most
        self._taken = 0
        self._round = 0
        self._answers = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def limit(self) -> int:
        """Places that there are now."""
        return self._limit

    @property
    def taken(self) -> int:
        """Places that are taken; more than `limit` just after a refusal."""
        return self._taken

    async def take(self, *, first: bool = False) -> int:
        """Waits for a place, ahead of the others if `first`; returns the round that it is of."""
        if self._taken < self._limit and not self._waiting:
            self._taken += 1
            return self._round
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        (self._waiting.appendleft if first else self._waiting.append)(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                # It was given the place in the moment in which it was cancelled.
                self.give_back()
            else:
                self._waiting.remove(turn)
            raise
        return self._round

    def give_back(self) -> None:
        """Ends the use of a place."""
        self._taken -= 1
        self._hand_out()

    def refused(self, of_round: int) -> None:
        """Halves the places, once for all requests that were sent in the same round."""
        if of_round != self._round:
            return
        self._round += 1
        self._answers = 0
        self._limit = max(1, self._limit // 2)

    def answered(self) -> None:
        """Counts an answer towards a further place."""
        self._answers += 1
        if self._answers >= self._limit and self._limit < self._most:
            self._answers = 0
            self._limit += 1
            self._hand_out()

    def _hand_out(self) -> None:
        while self._waiting and self._taken < self._limit:
            turn = self._waiting.popleft()
            if not turn.done():
                self._taken += 1
                turn.set_result(None)
