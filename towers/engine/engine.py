"""Base of both engines: open rows with their calls and memory, and the loop of passes.

All coroutines of an engine belong to one event loop. Passes run in that loop, or with
`threaded=True` in one worker thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from twotower.towers.engine.admission import Admission
from twotower.towers.engine.options import PassLimits
from twotower.towers.engine.scheduler import BatchLoop
from twotower.towers.engine.stats import EngineStats
from twotower.towers.engine.turns import Turn
from twotower.towers.errors import UnavailableError
from twotower.towers.state.context_state import ContextState
from twotower.towers.state.pool import StatePool

Work = TypeVar("Work")
Result = TypeVar("Result")
Row = TypeVar("Row", bound="EngineRow")
T = TypeVar("T")


@dataclass(eq=False)
class EngineRow:
    """A row that is open on one side, with the calls that work on it now; without a state as long
    as it waits for room or for the state itself."""

    row_id: str
    state: ContextState | None = None
    tasks: set[asyncio.Future[Any]] = field(default_factory=set)
    released: bool = False


class Engine(Generic[Row, Work, Result]):
    """Rows of many requests in one tower, batched pass by pass.

    `run` runs the works of a pass. Rows wait in `admission` for their memory; None in an engine
    that reads the states of another. `turn` is its share of a device that it shares.
    """

    def __init__(
        self,
        name: str,
        run: Callable[[Sequence[Work]], Sequence[Result | BaseException]],
        admission: Admission | None,
        limits: PassLimits,
        threaded: bool,
        turn: Turn | None = None,
    ) -> None:
        self._rows: dict[str, Row] = {}
        self._admission = admission
        executor = ThreadPoolExecutor(1, name) if threaded else None
        self._loop: BatchLoop[Work, Result] = BatchLoop(run, limits, executor, turn)

    @property
    def num_rows(self) -> int:
        """Rows that are open or wait for room."""
        return len(self._rows)

    def stats(self) -> EngineStats:
        """Counters since the start and the present load."""
        loop, clock = self._loop, time.monotonic()
        return EngineStats(
            rows=len(self._rows),
            queued_rows=self._num_waiting,
            pending_work=loop.pending_work,
            passes=loop.passes,
            pass_rows=loop.pass_rows,
            pass_tokens=loop.pass_tokens,
            prefill_tokens=loop.prefill_tokens,
            pass_seconds=loop.pass_seconds,
            clock_seconds=clock,
            busy_share=loop.busy_share(clock),
            **({} if self._admission is None else _memory(self._admission.pool)),
        )

    @property
    def _num_waiting(self) -> int:
        """Rows that wait for room."""
        return self._admission.num_waiting if self._admission is not None else 0

    def check_progress(self, limit_s: float) -> None:
        """Raises UnavailableError if a pass has been running for longer: its device hangs."""
        age = self._loop.pass_age
        if age > limit_s:
            raise UnavailableError(f"a pass has not ended in {age:.0f} s, limit {limit_s:g} s")

    async def release(self, row_id: str) -> None:
        """Frees the row, after the pass that may still touch its state."""
        if await self._close(row_id) and self._admission is not None:
            self._admission.release(row_id)

    async def _open(self, row: Row, capacity: int) -> None:
        """Adds a row and waits for its slot and pages."""
        self._add(row)
        if self._admission is None:
            return
        try:
            row.state = await self._owned(row, self._admission.acquire(row.row_id, capacity))
        except BaseException:
            await self.release(row.row_id)
            raise

    def _add(self, row: Row) -> Row:
        if row.row_id in self._rows:
            raise ValueError(f"row_id: {row.row_id} is open already")
        self._rows[row.row_id] = row
        return row

    def _row(self, row_id: str) -> Row:
        row = self._rows.get(row_id)
        if row is None:
            raise UnavailableError("the row was released")
        return row

    async def _owned(self, row: Row, work: Coroutine[Any, Any, T]) -> T:
        """Runs a call of a row so that the row's release ends it."""
        task = asyncio.ensure_future(work)
        row.tasks.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            if row.released and not _being_cancelled():
                raise UnavailableError("the row was released") from None
            raise
        finally:
            row.tasks.discard(task)

    async def _close(self, row_id: str) -> bool:
        """Ends a row's calls and waits for the pass that may still touch its state.

        True if the row was open; its memory may be given back then.
        """
        row = self._rows.pop(row_id, None)
        if row is None:
            return False
        row.released = True
        tasks = list(row.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if row.state is not None:
            await self._loop.settle()
        return True


def _memory(pool: StatePool) -> dict[str, int]:
    """The counters of a pool, by their names in EngineStats."""
    return {
        "slots": pool.slots.num_slots,
        "slots_used": pool.slots_used,
        "pages": pool.pages.num_pages,
        "pages_used": pool.pages_used,
        "state_bytes": pool.state_bytes,
        "pool_bytes": pool.num_bytes,
    }


def _being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def state_of(state: ContextState | None) -> ContextState:
    """The state of a row that has been given its room."""
    if state is None:
        raise UnavailableError("the row has no room yet")
    return state
