"""Tokens/s of rows on one device, from the seconds of its passes.

In step, all rows of a batch start and end every block together. Otherwise rows wait for an
extension at different times. An extension of a few rows reads as many experts as one of all rows,
so the speed depends on the share of rows that must wait before an extension runs, the patience; the
best share is found by simulation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from twotower.planner.schedules import Schedule

# Shares of the rows that must wait before an extension runs.
_PATIENCE = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class PassSeconds:
    """Seconds of a denoiser pass and of an extension by a block, as functions of the rows."""

    denoise: Callable[[int], float]
    extend: Callable[[int], float]


def in_step_tokens_per_s(
    rows: int, block: int, steps: float, denoise: float, extend: float
) -> float:
    """Tokens/s of `rows` rows that take `steps` denoiser passes and one extension a block."""
    return rows * block / (steps * denoise + extend)


def best_tokens_per_s(
    schedules: Sequence[Sequence[Schedule]], seconds: PassSeconds, rounds: int = 4
) -> float:
    """Tokens/s of rows that replay schedules[row] each, at the best patience."""
    return max(tokens_per_s(schedules, seconds, patience, rounds) for patience in _PATIENCE)


def tokens_per_s(
    schedules: Sequence[Sequence[Schedule]],
    seconds: PassSeconds,
    patience: float,
    rounds: int = 4,
) -> float:
    """Tokens/s of rows that replay schedules[row] each; passes of both kinds take turns.

    An extension runs as soon as the share `patience` of the rows waits for it, or all of them do.
    Blocks count from the end of the first round of every row's schedules on.
    """
    rows = [_Row(row) for row in schedules]
    longest = max(map(len, schedules))
    clock = begun = 0.0
    tokens = 0
    while min(row.done for row in rows) < rounds * longest:
        waiting = [row for row in rows if not row.left]
        ready = [row for row in rows if row.left]
        if waiting and (not ready or len(waiting) >= max(1.0, patience * len(rows))):
            clock += seconds.extend(len(waiting))
            settled = min(row.done for row in rows) >= longest
            ended = sum(row.next_block() for row in waiting)
            if settled:
                tokens += ended
            else:
                begun = clock
        else:
            clock += seconds.denoise(len(ready))
            for row in ready:
                row.left -= 1
    return tokens / (clock - begun)


class _Row:
    """A row in a simulation: `done` blocks, and `left` passes of the current block."""

    def __init__(self, schedules: Sequence[Schedule]) -> None:
        self._schedules = schedules
        self.done = 0
        self.left = len(schedules[0])

    def next_block(self) -> int:
        """Begins the next block; returns the tokens of the block that ended."""
        ended = self._schedules[self.done % len(self._schedules)]
        self.done += 1
        self.left = len(self._schedules[self.done % len(self._schedules)])
        return sum(ended)
