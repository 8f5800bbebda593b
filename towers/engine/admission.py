"""Admission of rows to a pool's slots and pages: first come, first served."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from twotower.towers.errors import CapacityError, QueueFullError, UnavailableError
from twotower.towers.state.context_state import ContextState
from twotower.towers.state.pages import pages_for
from twotower.towers.state.pool import StatePool


@dataclass(frozen=True, eq=False)
class _Waiter:
    row_id: str
    capacity: int
    admitted: asyncio.Future[ContextState]


class Admission:
    """Rows that hold a slot and pages of a pool, and a queue of rows that wait for them.

    The head of the queue is never overtaken: a row that needs little does not starve one that
    needs much. `reclaim` is asked to free pages before a row is left waiting for them;
    `max_queued_requests` limits the queue. For one event loop.
    """

    def __init__(
        self,
        pool: StatePool,
        reclaim: Callable[[int], bool] | None = None,
        max_queued_requests: int | None = None,
    ) -> None:
        self.rows: dict[str, ContextState] = {}
        self.pool = pool
        self._reclaim = reclaim
        self._max_queued_requests = max_queued_requests
        self._queue: deque[_Waiter] = deque()

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    async def acquire(self, row_id: str, capacity: int) -> ContextState:
        """A state with room for `capacity` tokens, once it is the row's turn and there is room.

        Raises CapacityError for a row that the pool can never hold, QueueFullError if too many
        wait, UnavailableError if the row is released meanwhile.
        """
        if row_id in self.rows or any(waiter.row_id == row_id for waiter in self._queue):
            raise ValueError(f"row_id: {row_id} is open already")
        if not self.pool.could_ever_hold(capacity):
            limit = self.pool.most_pages
            raise CapacityError(
                f"row: got {capacity} tokens = {pages_for(capacity)} pages, expected at most "
                f"{limit * self.pool.page_tokens} tokens = {limit} pages for one row"
            )
        if not self._queue and self._has_room(capacity):
            return self._give(row_id, capacity)
        if self._max_queued_requests is not None and len(self._queue) >= self._max_queued_requests:
            raise QueueFullError(
                f"queue: {len(self._queue)} rows wait for room, expected fewer than "
                f"max_queued_requests = {self._max_queued_requests}"
            )
        waiter = _Waiter(row_id, capacity, asyncio.get_running_loop().create_future())
        self._queue.append(waiter)
        return await self._turn_of(waiter)

    def release(self, row_id: str) -> None:
        """Frees the row's state, or takes the row out of the queue; an unknown row is fine."""
        state = self.rows.pop(row_id, None)
        if state is not None:
            self.pool.close(state)
        for waiter in [each for each in self._queue if each.row_id == row_id]:
            self._queue.remove(waiter)
            if not waiter.admitted.done():
                waiter.admitted.set_exception(_released())
        self.admit()

    def admit(self) -> None:
        """Lets rows in from the head of the queue while there is room for it; to be called when
        pages came free in another way than by `release`."""
        while self._queue and self._has_room(self._queue[0].capacity):
            waiter = self._queue.popleft()
            if not waiter.admitted.done():
                waiter.admitted.set_result(self._give(waiter.row_id, waiter.capacity))

    async def _turn_of(self, waiter: _Waiter) -> ContextState:
        try:
            state = await waiter.admitted
        except asyncio.CancelledError:
            self._withdraw(waiter)
            raise
        # Between its turn and this line the row may have been released.
        if self.rows.get(waiter.row_id) is not state:
            raise _released()
        return state

    def _withdraw(self, waiter: _Waiter) -> None:
        """Ends a cancelled wait, also if its turn had come."""
        if waiter in self._queue:
            self._queue.remove(waiter)
            self.admit()
            return
        done = not waiter.admitted.cancelled() and waiter.admitted.exception() is None
        if done and self.rows.get(waiter.row_id) is waiter.admitted.result():
            self.release(waiter.row_id)

    def _has_room(self, capacity: int) -> bool:
        pool = self.pool
        missing = pages_for(capacity) - pool.pages.num_free
        if missing > 0 and pool.slots.num_free and self._reclaim is not None:
            self._reclaim(missing)
        return pool.room_for(capacity)

    def _give(self, row_id: str, capacity: int) -> ContextState:
        state = self.rows[row_id] = self.pool.open(capacity)
        return state


def _released() -> UnavailableError:
    return UnavailableError("the row was released while it waited for room")
