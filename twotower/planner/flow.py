"""Tokens/s of rows that are passed between one context tower and its denoisers block by block."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from twotower.planner.schedules import Schedule
from twotower.planner.speedup import PassSeconds

_CONTEXT = -1


@dataclass(frozen=True)
class Flow:
    """Tokens/s, and the shares of the time that the towers were busy (denoisers: the mean)."""

    tokens_per_s: float
    context_busy: float
    denoiser_busy: float


def in_step_pair(
    rows: int, block: int, steps: float, denoisers: int, passes: PassSeconds, land: float
) -> float:
    """Tokens/s if all `rows` rows of a denoiser start and end every block together. The context
    tower extends one denoiser's rows at a time and may be the bottleneck. `land`: seconds in which
    a denoiser takes over its rows' updates."""
    extend = passes.extend(rows)
    cycle = steps * passes.denoise(rows) + land + extend
    return denoisers * rows * block / max(cycle, denoisers * extend)


def simulate_pair(
    schedules: Sequence[Sequence[Sequence[Schedule]]],
    passes: PassSeconds,
    land: Callable[[int], float],
    rounds: int = 2,
) -> Flow:
    """Simulates continuous batching; schedules[denoiser][row] are a row's blocks, repeated.

    A free tower takes all rows that wait for it. The first pass of a block also costs `land`
    seconds, by rows, for their updates. A round is each row's schedules once; the first does not
    count.
    """
    return _Simulation(schedules, passes, land).run(rounds)


class _Row:
    """A row's place in its schedules: `left` passes of the current block, after `done` blocks."""

    def __init__(self, denoiser: int, schedules: Sequence[Schedule]) -> None:
        self.denoiser = denoiser
        self.length = len(schedules)
        self.done = 0
        self.landed = False
        self.left = len(schedules[0])
        self._schedules = schedules

    def next_block(self) -> int:
        """Begins the next block; returns the tokens of the block that ended."""
        ended = self._schedules[self.done % self.length]
        self.done += 1
        self.left = len(self._schedules[self.done % self.length])
        self.landed = False
        return sum(ended)


class _Simulation:
    """A queue of rows for each tower, and the passes that run, by the time of their end."""

    def __init__(
        self,
        schedules: Sequence[Sequence[Sequence[Schedule]]],
        passes: PassSeconds,
        land: Callable[[int], float],
    ) -> None:
        self._passes, self._land = passes, land
        self._rows = [
            _Row(denoiser, row) for denoiser, rows in enumerate(schedules) for row in rows
        ]
        towers = [*range(len(schedules)), _CONTEXT]
        self._queues: dict[int, list[_Row]] = {tower: [] for tower in towers}
        self._busy: dict[int, float] = dict.fromkeys(towers, 0.0)
        # When a pass ends, in which tower, when it began, and its rows.
        self._events: list[tuple[float, int, float, list[_Row]]] = []
        self._working: set[int] = set()
        for row in self._rows:
            self._queues[row.denoiser].append(row)

    def run(self, rounds: int) -> Flow:
        """Runs until every row has ended `rounds` rounds."""
        clock = begun = 0.0
        tokens = 0
        settled = False
        for tower in self._queues:
            self._start(tower, clock)
        while min(row.done - rounds * row.length for row in self._rows) < 0:
            clock, tower, start, batch = heapq.heappop(self._events)
            self._working.remove(tower)
            ended = self._extended(batch) if tower == _CONTEXT else self._denoised(batch)
            if settled:
                tokens += ended
                self._busy[tower] += clock - max(start, begun)
            elif all(row.done >= row.length for row in self._rows):
                settled, begun = True, clock
            for free in {tower, _CONTEXT, *(row.denoiser for row in batch)}:
                self._start(free, clock)
        for _, tower, start, _ in self._events:
            self._busy[tower] += clock - max(start, begun)
        elapsed = clock - begun
        shares = {tower: busy / elapsed for tower, busy in self._busy.items()}
        context = shares.pop(_CONTEXT)
        return Flow(tokens / elapsed, context, sum(shares.values()) / len(shares))

    def _start(self, tower: int, clock: float) -> None:
        batch = self._queues[tower]
        if not batch or tower in self._working:
            return
        self._queues[tower] = []
        if tower == _CONTEXT:
            seconds = self._passes.extend(len(batch))
        else:
            fresh = sum(not row.landed for row in batch)
            seconds = self._passes.denoise(len(batch)) + self._land(fresh)
        self._working.add(tower)
        heapq.heappush(self._events, (clock + seconds, tower, clock, batch))

    def _denoised(self, batch: Sequence[_Row]) -> int:
        for row in batch:
            row.landed = True
            row.left -= 1
            self._queues[row.denoiser if row.left else _CONTEXT].append(row)
        return 0

    def _extended(self, batch: Sequence[_Row]) -> int:
        ended = 0
        for row in batch:
            ended += row.next_block()
            self._queues[row.denoiser].append(row)
        return ended
