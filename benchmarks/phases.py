"""Which phase of its life a row is in, and cancels within a chosen one.

The classes stand between a pair and its towers and pass everything on.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from benchmarks.soak_requests import Cancel
from twotower.cluster.services.remote import WatchedContext, WatchedDenoiser
from twotower.towers.decoding.services import Block, Prefilled
from twotower.towers.request.params import GenerationParams
from twotower.towers.state.context_state import ContextState
from twotower.towers.state.link import StateLink, UpdateWriter
from twotower.towers.state.update import UpdatePlan


@dataclass
class _Life:
    """A row's task, how often it entered each phase and which of them it is in now."""

    task: asyncio.Task[Any]
    cancel: Cancel | None
    entries: Counter[str] = field(default_factory=Counter)
    inside: Counter[str] = field(default_factory=Counter)
    timer: asyncio.TimerHandle | None = None


class Phases:
    """Rows by phase. `cancels` counts those sent, by the phase in which they arrived: the
    intended one or, if the row had left it by then, "between"."""

    def __init__(self) -> None:
        self.cancels: Counter[str] = Counter()
        self._lives: dict[str, _Life] = {}

    def follow(self, row_id: str, task: asyncio.Task[Any], cancel: Cancel | None) -> None:
        """Begins a row's life, with a cancel if there is to be one."""
        self._lives[row_id] = _Life(task, cancel)

    def forget(self, row_id: str) -> None:
        """Ends it."""
        life = self._lives.pop(row_id)
        if life.timer is not None:
            life.timer.cancel()

    @contextmanager
    def phase(self, row_id: str, name: str) -> Iterator[None]:
        """The row is in a phase for as long as the block lasts."""
        life = self._lives.get(row_id)
        if life is None:
            yield
            return
        life.entries[name] += 1
        life.inside[name] += 1
        planned = life.cancel
        if planned is not None and (name, life.entries[name]) == (planned.phase, planned.entry):
            loop = asyncio.get_running_loop()
            life.timer = loop.call_later(planned.delay, self._fire, life, name)
        try:
            yield
        finally:
            life.inside[name] -= 1

    def _fire(self, life: _Life, name: str) -> None:
        if life.task.cancel():
            self.cancels[name if life.inside[name] else "between"] += 1


class PhasedContext:
    """A context tower whose rows' phases are followed."""

    def __init__(self, tower: WatchedContext, phases: Phases) -> None:
        self._tower = tower
        self._phases = phases

    async def open(self, row_id: str, capacity: int) -> int:
        with self._phases.phase(row_id, "queued"):
            return await self._tower.open(row_id, capacity)

    async def prefill(
        self, row_id: str, prompt: Sequence[int], generated: Sequence[int], params: GenerationParams
    ) -> Prefilled:
        with self._phases.phase(row_id, "prefill"):
            return await self._tower.prefill(row_id, prompt, generated, params)

    async def extend(self, row_id: str, token_ids: Sequence[int]) -> int:
        with self._phases.phase(row_id, "extension"):
            return await self._tower.extend(row_id, token_ids)

    async def decode(self, row_id: str, count: int, params: GenerationParams) -> Block:
        with self._phases.phase(row_id, "denoising"):
            return await self._tower.decode(row_id, count, params)

    async def verify(self, row_id: str, draft: Sequence[int], params: GenerationParams) -> Block:
        with self._phases.phase(row_id, "extension"):
            return await self._tower.verify(row_id, draft, params)

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        return await self._tower.score(token_ids)

    async def release(self, row_id: str) -> None:
        await self._tower.release(row_id)

    async def stats(self) -> dict[str, float]:
        return await self._tower.stats()

    async def check(self) -> None:
        await self._tower.check()


class PhasedDenoiser:
    """A denoiser tower whose rows' phases are followed."""

    def __init__(self, tower: WatchedDenoiser, phases: Phases) -> None:
        self._tower = tower
        self._phases = phases

    async def open(self, row_id: str, capacity: int) -> None:
        with self._phases.phase(row_id, "queued"):
            await self._tower.open(row_id, capacity)

    async def denoise_block(
        self, row_id: str, position: int, params: GenerationParams, known: Sequence[int] = ()
    ) -> Block:
        with self._phases.phase(row_id, "denoising"):
            return await self._tower.denoise_block(row_id, position, params, known)

    async def next_token(
        self, row_id: str, position: int, last_token: int, params: GenerationParams
    ) -> Block:
        with self._phases.phase(row_id, "denoising"):
            return await self._tower.next_token(row_id, position, last_token, params)

    async def release(self, row_id: str) -> None:
        await self._tower.release(row_id)

    async def stats(self) -> dict[str, float]:
        return await self._tower.stats()

    async def check(self) -> None:
        await self._tower.check()


class PhasedLink:
    """A link whose updates are a phase of their rows while they wait for their receipts."""

    def __init__(self, link: StateLink, phases: Phases) -> None:
        self._link = link
        self._phases = phases

    def open(self, row_id: str) -> None:
        self._link.open(row_id)

    def begin(self, row_id: str, state: ContextState, plan: UpdatePlan) -> UpdateWriter:
        return _PhasedWriter(self._link.begin(row_id, state, plan), row_id, self._phases)

    def forget(self, row_id: str) -> None:
        self._link.forget(row_id)


class _PhasedWriter:
    def __init__(self, writer: UpdateWriter, row_id: str, phases: Phases) -> None:
        self.takes_shares = writer.takes_shares
        self._writer = writer
        self._row_id = row_id
        self._phases = phases

    def put(self, name: str, layer: int, tensor: Tensor) -> None:
        self._writer.put(name, layer, tensor)

    async def finish(self) -> None:
        with self._phases.phase(self._row_id, "transfer"):
            await self._writer.finish()

    def abort(self) -> None:
        self._writer.abort()
