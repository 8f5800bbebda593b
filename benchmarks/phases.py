"""Which phase of its life a row is in, and cancels within a chosen one.

The classes stand between a pair and its towers and pass everything on.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from benchmarks.soak_requests import Cancel
from twotower.cluster.services.tower_services import (
    Call,
    ContextTowerService,
    DenoiserTowerService,
    P,
    T,
    TowerService,
    bound,
)
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


# The phases of a row in which calls of its towers are.
PHASES = {
    "open": "queued",
    "prefill": "prefill",
    "extend": "extension",
    "verify": "extension",
    "decode": "denoising",
    "denoise_block": "denoising",
    "next_token": "denoising",
}


class _Phased(TowerService):
    """A tower whose rows' phases are followed."""

    def __init__(self, tower: TowerService, phases: Phases) -> None:
        self._tower = tower
        self._phases = phases

    async def _call(self, call: Call[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        phase = PHASES.get(call.__name__)
        if phase is None:
            return await bound(self._tower, call)(*args, **kwargs)
        with self._phases.phase(str(args[0]), phase):
            return await bound(self._tower, call)(*args, **kwargs)


class PhasedContext(_Phased, ContextTowerService):
    """A context tower whose rows' phases are followed."""


class PhasedDenoiser(_Phased, DenoiserTowerService):
    """A denoiser tower whose rows' phases are followed."""


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
