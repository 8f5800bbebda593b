"""What both engines share: rows that own tasks, memory that outlives no row, the pass loop.

An engine fulfils its side of `protocols.py`. All its coroutines belong to one event loop. Passes
run in that loop, or with `threaded=True` in one worker thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from twotower.towers.backbone import Tower
from twotower.towers.batching import BatchLoop
from twotower.towers.errors import UnavailableError
from twotower.towers.memory import MemoryBudget, StatePool, pool_for
from twotower.towers.scheduler import PassLimits
from twotower.towers.state import ContextState

PREFIX_CACHE_BYTES = 64 << 20

Work = TypeVar("Work")
Result = TypeVar("Result")
Row = TypeVar("Row", bound="EngineRow")
T = TypeVar("T")


@dataclass(frozen=True)
class EngineOptions:
    """What an operator decides about a pair of engines; the towers decide the rest."""

    budget: MemoryBudget = field(default_factory=MemoryBudget)
    limits: PassLimits = field(default_factory=PassLimits)
    max_waiting: int | None = None
    prefix_cache_bytes: int = PREFIX_CACHE_BYTES

    def pool_for(self, tower: Tower) -> StatePool:
        """The memory of a tower's rows. Raises ConfigError if the budget holds none."""
        return pool_for(tower.config, self.budget, tower.device, tower.dtype)


@dataclass(eq=False)
class EngineRow:
    """A row that is open on one side, with the calls that work on it now; without a state as long
    as it waits for room or for the state itself."""

    row_id: str
    state: ContextState | None = None
    tasks: set[asyncio.Future[Any]] = field(default_factory=set)
    released: bool = False


class Engine(Generic[Row, Work, Result]):
    """Rows of many requests in one tower, batched pass by pass."""

    def __init__(
        self,
        name: str,
        run: Callable[[Sequence[Work]], Sequence[Result | BaseException]],
        limits: PassLimits,
        threaded: bool,
    ) -> None:
        self._rows: dict[str, Row] = {}
        executor = ThreadPoolExecutor(1, name) if threaded else None
        self._loop: BatchLoop[Work, Result] = BatchLoop(run, limits, executor)

    @property
    def num_rows(self) -> int:
        """Rows that are open or wait for room."""
        return len(self._rows)

    def stats(self) -> dict[str, float]:
        """Counters since the start and the present load."""
        return {
            "rows": len(self._rows),
            "waiting": self._loop.waiting,
            **self._loop.stats.report(),
        }

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


def _being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def ends_of(lengths: Sequence[int]) -> list[int]:
    """Where each of a pass's rows ends in the packed tokens."""
    ends, total = [], 0
    for length in lengths:
        total += length
        ends.append(total)
    return ends


def in_order(places: Sequence[int], results: Sequence[T]) -> list[T]:
    """Results of a pass whose rows were sorted, back in the order of its works."""
    pairs = sorted(zip(places, range(len(results)), strict=True))
    return [results[index] for _, index in pairs]


def state_of(state: ContextState | None) -> ContextState:
    """The state of a row that has been given its room."""
    if state is None:
        raise UnavailableError("the row has no room yet")
    return state
