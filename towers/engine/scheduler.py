"""Joins work of concurrent rows into shared passes: the policy, and the loop that runs passes."""

from __future__ import annotations

import asyncio
import copy
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Generic, TypeVar

from twotower.towers.decoding.services import PassTime
from twotower.towers.engine.options import PassLimits
from twotower.towers.engine.turns import Load, Turn

Work = TypeVar("Work")
Result = TypeVar("Result")


class PassScheduler:
    """Tickets of waiting work, handed out pass by pass; no tensors, no clocks.

    Three kinds of work wait, each in order of arrival: pieces of a block that has begun, other
    pieces (block extensions, decode steps, first steps of a block), and prefill pieces. The first
    two kinds share one budget, begun blocks first: a block that has begun is done within its
    steps, so nothing waits for ever, and rows that run block by block drift apart less than rows
    that share every pass.

    Other work is delayed by at most one share of prefill: after a pass with prefill, prefill rests
    for one pass if anything else waits. So prefill has its share of every second pass, or all
    passes when it is alone. A piece beyond a limit runs as the only one of its kind in its pass.
    """

    def __init__(self, limits: PassLimits) -> None:
        self._limits = limits
        self._begun: dict[int, int] = {}
        self._other: dict[int, int] = {}
        self._prefill: dict[int, int] = {}
        self._prefill_rests = False

    def __len__(self) -> int:
        return len(self._begun) + len(self._other) + len(self._prefill)

    def add(self, ticket: int, tokens: int, prefill: bool = False, begun: bool = False) -> None:
        """Puts work of `tokens` tokens behind all of its kind; a block's later steps are `begun`.

        Raises ValueError for a ticket that waits already and for fewer than 1 token.
        """
        if any(ticket in kind for kind in self._kinds()):
            raise ValueError(f"ticket: {ticket} waits already")
        if tokens < 1:
            raise ValueError(f"tokens: got {tokens}, expected at least 1")
        if prefill and begun:
            raise ValueError("begun: a prefill piece belongs to no block")
        (self._prefill if prefill else self._begun if begun else self._other)[ticket] = tokens

    def withdraw(self, ticket: int) -> None:
        """Forgets a ticket; a ticket that does not wait is ignored."""
        for kind in self._kinds():
            kind.pop(ticket, None)

    def take(self) -> list[int]:
        """The tickets of the next pass; none if nothing waits."""
        limits, max_rows = self._limits, self._limits.max_rows_per_pass
        work = [*self._begun.items(), *self._other.items()]
        taken = _fitting(work, limits.max_num_batched_tokens, max_rows)
        if taken and self._prefill_rests:
            pieces = []
        elif taken:
            pieces = _fitting(self._prefill.items(), limits.max_prefill_tokens, max_rows)
        else:
            pieces = _fitting(self._prefill.items(), limits.max_num_batched_tokens, max_rows)
        self._prefill_rests = bool(pieces)
        taken += pieces
        for ticket in taken:
            self.withdraw(ticket)
        return taken

    def _kinds(self) -> tuple[dict[int, int], ...]:
        return (self._begun, self._other, self._prefill)


def _fitting(work: Iterable[tuple[int, int]], tokens: int, rows: int | None) -> list[int]:
    """The first tickets of (ticket, tokens) within the limits, the very first in any case.

    Stops at the first that does not fit: a smaller one behind it must not overtake it for ever.
    """
    taken: list[int] = []
    left = tokens
    for ticket, cost in work:
        if taken and (cost > left or len(taken) == rows):
            break
        taken.append(ticket)
        left -= cost
    return taken


@dataclass(frozen=True)
class Served(Generic[Result]):
    """The result of a piece of work, and the pass that it was in."""

    result: Result
    passed: PassTime


@dataclass(frozen=True)
class _Waiting(Generic[Work, Result]):
    work: Work
    tokens: int
    prefill: bool
    patient: bool
    future: asyncio.Future[Served[Result]]


class BatchLoop(Generic[Work, Result]):
    """Runs `run(works) -> results` over the waiting work, pass by pass within `limits`.

    Rows submit a piece of work each and wait; a row may join or leave at any pass. `run` is given
    the short works first, so that neighbours of one length share their products. A result may be
    an exception, which is raised to its submitter alone. With an executor the passes leave the
    event loop responsive. With a `turn` they alternate with those of another loop.

    `passes` have run over `pass_rows` pieces of work of `pass_tokens` tokens, `prefill_tokens`
    among them, in `pass_seconds`.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Work]], Sequence[Result | BaseException]],
        limits: PassLimits,
        executor: Executor | None = None,
        turn: Turn | None = None,
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
        self._turn = turn
        if turn is not None:
            turn.watch(self.load)

    @property
    def pass_age(self) -> float:
        """Seconds since the pass that runs now began; 0 between passes."""
        began = self._pass_began
        return 0.0 if began is None else time.monotonic() - began

    @property
    def pending_work(self) -> int:
        """Pieces of work that no pass has taken yet."""
        return len(self._waiting)

    def load(self) -> Load:
        """What waits now."""
        waiting = self._waiting.values()
        return Load(len(waiting), urgent=not all(entry.patient for entry in waiting))

    def busy_share(self, clock: float) -> float:
        """Share of the time from the first pass to `clock`, of `time.monotonic`, in passes."""
        lifetime = 0.0 if self._first_pass_at is None else clock - self._first_pass_at
        return self.pass_seconds / lifetime if lifetime > 0 else 0.0

    async def submit(
        self,
        work: Work,
        tokens: int,
        *,
        prefill: bool = False,
        begun: bool = False,
        patient: bool = False,
    ) -> Result:
        """As `serve`, the result alone."""
        how = {"prefill": prefill, "begun": begun, "patient": patient}
        return (await self.serve(work, tokens, **how)).result

    async def serve(
        self,
        work: Work,
        tokens: int,
        *,
        prefill: bool = False,
        begun: bool = False,
        patient: bool = False,
    ) -> Served[Result]:
        """Waits for the pass that takes `work`, which counts as `tokens`; cancel to withdraw it.

        `prefill` and `begun` are kinds of work, see `PassScheduler`; `patient` work may wait for
        more of its kind, see `turns`. Raises the exception that the pass gave for this work, or a
        copy of the pass's exception.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Served[Result]] = loop.create_future()
        ticket = next(self._tickets)
        self._scheduler.add(ticket, tokens, prefill, begun)
        self._waiting[ticket] = _Waiting(work, tokens, prefill, patient, future)
        self._tell()
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._serve())
        try:
            return await future
        finally:
            if self._waiting.pop(ticket, None) is not None:
                self._scheduler.withdraw(ticket)
                self._tell()

    def _tell(self) -> None:
        if self._turn is not None:
            self._turn.changed()

    async def settle(self) -> None:
        """Waits for the end of the pass that runs now, if any: it may still use withdrawn work."""
        if self._running is not None:
            await asyncio.wait([self._running])

    async def _serve(self) -> None:
        # Work comes in rounds: rows that a pass has served submit again in the same turn of the
        # event loop. One turn of patience lets them share the next pass too.
        await asyncio.sleep(0)
        while self._waiting:
            async with self._turn or nullcontext():
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
        self._pass_began, before = time.monotonic(), self.pass_seconds
        if self._first_pass_at is None:
            self._first_pass_at = self._pass_began
        results: Sequence[Result | BaseException]
        try:
            if self._executor is None:
                results = self._timed_run(batch)
            else:
                loop = asyncio.get_running_loop()
                self._running = loop.run_in_executor(self._executor, self._timed_run, batch)
                results = await self._running
        except Exception as error:
            results = [_copy_of(error) for _ in batch]
        finally:
            self._running = self._pass_began = None
        tokens = sum(entry.tokens for entry in batch)
        prefill = sum(entry.tokens for entry in batch if entry.prefill)
        passed = PassTime(self.pass_seconds - before, tokens, len(batch), prefill)
        self.passes += 1
        self.pass_rows += len(batch)
        self.pass_tokens += tokens
        self.prefill_tokens += prefill
        for entry, result in zip(batch, results, strict=True):
            if entry.future.done():
                continue
            if isinstance(result, BaseException):
                entry.future.set_exception(result)
            else:
                entry.future.set_result(Served(result, passed))

    def _timed_run(
        self, batch: Sequence[_Waiting[Work, Result]]
    ) -> Sequence[Result | BaseException]:
        # In the pass's thread: the event loop may be late to hear of its end.
        started = time.monotonic()
        order = sorted(range(len(batch)), key=lambda index: batch[index].tokens)
        try:
            results = self._run([batch[index].work for index in order])
        finally:
            self.pass_seconds += time.monotonic() - started
        by_index = dict(zip(order, results, strict=True))
        return [by_index[index] for index in range(len(batch))]


def _copy_of(error: Exception) -> Exception:
    """A copy of a pass's error for one submitter: a shared exception would share its traceback."""
    try:
        copied = copy.copy(error)
    except Exception:
        return error
    copied.__cause__, copied.__traceback__ = error.__cause__, error.__traceback__
    return copied
