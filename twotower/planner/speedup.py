"""How fast rows could be decoded if every pass took exactly its floor.

In step, all rows of a batch start and end every block together. Without that, rows wait for an
extension at different times; an extension of few rows reads as many experts as one of all rows, so
how long to wait for company decides. The best share of waiting rows is found by simulation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from twotower.planner.schedules import Schedule

# Shares of the rows that must wait for an extension before one is run.
_PATIENCE = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class PassSeconds:
    """Seconds of a pass over so many rows: of the denoiser, and of an extension by a block."""

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
    """Tokens/s of rows that each replay their own blocks, with the best patience."""
    return max(tokens_per_s(schedules, seconds, patience, rounds) for patience in _PATIENCE)


def tokens_per_s(
    schedules: Sequence[Sequence[Schedule]],
    seconds: PassSeconds,
    patience: float,
    rounds: int = 4,
) -> float:
    """The same for one patience, on one device: passes of both kinds take turns.

    An extension runs once more than `patience` of the rows wait for one, or nothing else is left
    to do. Counted are blocks from the end of the first round of every row's schedules on.
    """
    rows = [_Row(own) for own in schedules]
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
    """A row in a simulation: blocks done, and passes left of the present one."""

    def __init__(self, schedules: Sequence[Schedule]) -> None:
        self._schedules = schedules
        self.done = 0
        self.left = len(schedules[0])

    def next_block(self) -> int:
        """Begins the next block; the tokens of the one that ended."""
        ended = self._schedules[self.done % len(self._schedules)]
        self.done += 1
        self.left = len(self._schedules[self.done % len(self._schedules)])
        return sum(ended)
