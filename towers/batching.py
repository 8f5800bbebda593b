"""Joins work of concurrent rows into shared passes.

Rows submit one piece of work each and wait; the loop takes what is waiting, in order and up to a
token budget, and runs it as one pass. A row may join or leave at any pass.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Generic, TypeVar

Work = TypeVar("Work")
Result = TypeVar("Result")


@dataclass
class PassStats:
    """What a batch loop has done: `passes` run over `rows` pieces of work in `seconds`."""

    passes: int = 0
    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class _Waiting(Generic[Work, Result]):
    work: Work
    tokens: int
    future: asyncio.Future[Result]


class BatchLoop(Generic[Work, Result]):
    """Runs `run(works) -> results` over whatever is waiting, at most `max_tokens` at a time.

    A result may be an exception, which only its own submitter sees. With an executor the passes
    leave the event loop responsive.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Work]], Sequence[Result | BaseException]],
        max_tokens: int,
        executor: Executor | None = None,
    ) -> None:
        self.stats = PassStats()
        self._run = run
        self._max_tokens = max_tokens
        self._executor = executor
        self._waiting: deque[_Waiting[Work, Result]] = deque()
        self._task: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Pieces of work that no pass has taken yet."""
        return len(self._waiting)

    async def submit(self, work: Work, tokens: int) -> Result:
        """Waits for the pass that takes `work`, which counts as `tokens`; cancel to withdraw it."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        self._waiting.append(_Waiting(work, tokens, future))
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._serve())
        return await future

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
        batch: list[_Waiting[Work, Result]] = []
        tokens = 0
        while self._waiting:
            entry = self._waiting[0]
            if not entry.future.done():
                if batch and tokens + entry.tokens > self._max_tokens:
                    break
                batch.append(entry)
                tokens += entry.tokens
            self._waiting.popleft()
        return batch

    async def _pass(self, batch: list[_Waiting[Work, Result]]) -> None:
        works = [entry.work for entry in batch]
        started = time.perf_counter()
        try:
            if self._executor is None:
                results = self._run(works)
            else:
                loop = asyncio.get_running_loop()
                results = await loop.run_in_executor(self._executor, self._run, works)
        except Exception as error:
            results = [error] * len(batch)
        self.stats.passes += 1
        self.stats.rows += len(batch)
        self.stats.tokens += sum(entry.tokens for entry in batch)
        self.stats.seconds += time.perf_counter() - started
        for entry, result in zip(batch, results, strict=True):
            if entry.future.done():
                continue
            if isinstance(result, BaseException):
                entry.future.set_exception(result)
            else:
                entry.future.set_result(result)
