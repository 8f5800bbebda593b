"""Follows the phases of rows, from queue to transfer, and cancels rows within a chosen phase.

`PhasedTower` and `PhasedLink` wrap a pair's towers and link, and forward all calls.
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
from twotower.towers.decoding.services import ContextService, DenoiserService
from twotower.towers.state.context_state import ContextState
from twotower.towers.state.link import StateLink, UpdateWriter
from twotower.towers.state.update import UpdatePlan

# The phase in which a row is during a call of a tower.
PHASE_OF = {
    "open": "queued",
    "prefill": "prefill",
    "denoise_block": "denoising",
    "next_token": "denoising",
    "decode": "denoising",
    "extend": "extension",
    "verify": "extension",
}
assert all(hasattr(ContextService, name) or hasattr(DenoiserService, name) for name in PHASE_OF)


@dataclass
class _Life:
    """A row's task, how often it has entered each phase, and the phases that it is in now."""

    task: asyncio.Task[Any]
    cancel: Cancel | None
    entries: Counter[str] = field(default_factory=Counter)
    inside: Counter[str] = field(default_factory=Counter)
    timer: asyncio.TimerHandle | None = None


class Phases:
    """Rows and their phases. `cancels` counts the cancels that were sent, by the phase in which
    they arrived: the intended phase or, if the row had left it by then, "between"."""

    def __init__(self) -> None:
        self.cancels: Counter[str] = Counter()
        self._lives: dict[str, _Life] = {}

    def follow(self, row_id: str, task: asyncio.Task[Any], cancel: Cancel | None) -> None:
        """Follows a row from now on, and cancels it as planned."""
        self._lives[row_id] = _Life(task, cancel)

    def forget(self, row_id: str) -> None:
        """Follows a row no longer."""
        life = self._lives.pop(row_id)
        if life.timer is not None:
            life.timer.cancel()

    @contextmanager
    def phase(self, row_id: str, name: str) -> Iterator[None]:
        """The row is in a phase for as long as the `with` block lasts."""
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


class PhasedTower:
    """A context or denoiser tower; while a call of `PHASE_OF` runs, its row is in that phase."""

    def __init__(self, tower: Any, phases: Phases) -> None:
        self._tower = tower
        self._phases = phases

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._tower, name)
        if name not in PHASE_OF:
            return call

        async def in_phase(row_id: str, *args: Any, **kwargs: Any) -> Any:
            with self._phases.phase(row_id, PHASE_OF[name]):
                return await call(row_id, *args, **kwargs)

        return in_phase


class PhasedLink:
    """A link; while an update waits for its receipt, its row is in the phase "transfer"."""

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
