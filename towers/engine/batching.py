"""Joins work of concurrent rows into shared passes.

Rows submit one piece of work each and wait; the loop runs what its scheduler takes as one pass. A
row may join or leave at any pass.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Generic, TypeVar

from twotower.towers.engine.options import PassLimits
from twotower.towers.engine.scheduler import PassScheduler

Work = TypeVar("Work")
Result = TypeVar("Result")


@dataclass(frozen=True)
class _Waiting(Generic[Work, Result]):
    work: Work
    tokens: int
    prefill: bool
    future: asyncio.Future[Result]


class BatchLoop(Generic[Work, Result]):
    """Runs `run(works) -> results` over what waits, pass by pass within `limits`.

    A result may be an exception, which only its own submitter sees. With an executor the passes
    leave the event loop responsive.

    `passes` have run over `pass_rows` pieces of work of `pass_tokens` tokens, `prefill_tokens`
    among them, in `pass_seconds`.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Work]], Sequence[Result | BaseException]],
        limits: PassLimits,
        executor: Executor | None = None,
    ) -> None:
        self.passes = self.pass_rows = self.pass_tokens = self.prefill_tokens = 0
        self.pass_seconds = 0.0
        self._first_pass_at: float | None = None
        self._run = run
        self._executor = executor
        self._scheduler = PassScheduler(limits)
        self._tickets = itertools.count()
        self._waiting: dict[int, _Waiting[Work, Result]] = {}
        self._task: asyncio.Task[None] | None = None
        self._running: asyncio.Future[Sequence[Result | BaseException]] | None = None
        self._pass_began: float | None = None

    @property
    def pass_age(self) -> float:
        """Seconds since the pass that runs now began; 0 between passes."""
        began = self._pass_began
        return 0.0 if began is None else time.monotonic() - began

    @property
    def pending_work(self) -> int:
        """Pieces of work that no pass has taken yet."""
        return len(self._waiting)

    def busy_share(self, clock: float) -> float:
        """Share of the time from the first pass to `clock`, of `time.monotonic`, in passes."""
        lifetime = 0.0 if self._first_pass_at is None else clock - self._first_pass_at
        return self.pass_seconds / lifetime if lifetime > 0 else 0.0

    async def submit(
        self, work: Work, tokens: int, *, prefill: bool = False, begun: bool = False
    ) -> Result:
        """Waits for the pass that takes `work`, which counts as `tokens`; cancel to withdraw it.

        `prefill` and `begun` are the scheduler's kinds. An exception is the submitter's own.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        ticket = next(self._tickets)
        self._scheduler.add(ticket, tokens, prefill, begun)
        self._waiting[ticket] = _Waiting(work, tokens, prefill, future)
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._serve())
        try:
            return await future
        finally:
            if self._waiting.pop(ticket, None) is not None:
                self._scheduler.withdraw(ticket)

    async def settle(self) -> None:
        """Waits for the end of the pass that runs now, if any: it may still use withdrawn work."""
        if self._running is not None:
            await asyncio.wait([self._running])

    async def _serve(self) -> None:
        # Work comes in rounds: rows that a pass has served submit again in the same turn of the
        # event loop. One turn of patience lets them share the next pass too.
        await asyncio.sleep(0)
        while self._waiting:
            batch = self._take()
            if batch:
                await self._pass(batch)
            await asyncio.sleep(0)

    def _take(self) -> list[_Waiting[Work, Result]]:
        # A submitter that was cancelled in this turn has had no chance to withdraw its work yet.
        for ticket in [t for t, entry in self._waiting.items() if entry.future.done()]:
            del self._waiting[ticket]
            self._scheduler.withdraw(ticket)
        return [self._waiting.pop(ticket) for ticket in self._scheduler.take()]

    async def _pass(self, batch: list[_Waiting[Work, Result]]) -> None:
        works = [entry.work for entry in batch]
        self._pass_began = time.monotonic()
        if self._first_pass_at is None:
            self._first_pass_at = self._pass_began
        results: Sequence[Result | BaseException]
        try:
            if self._executor is None:
                results = self._timed_run(works)
            else:
                loop = asyncio.get_running_loop()
                self._running = loop.run_in_executor(self._executor, self._timed_run, works)
                results = await self._running
        except Exception as error:
            results = [_copy_of(error) for _ in batch]
        finally:
            self._running = self._pass_began = None
        self.passes += 1
        self.pass_rows += len(batch)
        self.pass_tokens += sum(entry.tokens for entry in batch)
        self.prefill_tokens += sum(entry.tokens for entry in batch if entry.prefill)
        for entry, result in zip(batch, results, strict=True):
            if entry.future.done():
                continue
            if isinstance(result, BaseException):
                entry.future.set_exception(result)
            else:
                entry.future.set_result(result)

    def _timed_run(self, works: Sequence[Work]) -> Sequence[Result | BaseException]:
        # In the pass's own thread: the event loop may be late to hear of its end.
        started = time.monotonic()
        try:
            return self._run(works)
        finally:
            self.pass_seconds += time.monotonic() - started


def _copy_of(error: Exception) -> Exception:
    """The same error for one submitter: those who share an exception share its traceback too."""
    try:
        own = copy.copy(error)
    except Exception:
        return error
    own.__cause__, own.__traceback__ = error.__cause__, error.__traceback__
    return own
