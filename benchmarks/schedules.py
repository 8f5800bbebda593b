"""Commit schedules: how many tokens each step of a 16-token block committed.

Measured at threshold 0.8, 16 steps, temperature 0 on the released 30B model by the public
reproduction junze-eng/twotower-repro; one tuple a block. Random weights replay them, since their
own confidences mean nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import cycle

from twotower.towers.params import GenerationParams
from twotower.towers.unmasking import CommitRule, ReplayRule

Schedule = tuple[int, ...]

WORD_PROBLEM = (
    (1, 1, 1, 1, 1, 1, 1, 1, 2, 1, 2, 1, 1, 1),
    (1, 9, 1, 5),
    (5, 1, 1, 2, 1, 6),
    (1, 1, 1, 7, 3, 1, 1, 1),
)
FACT = (
    (1, 1, 1, 2, 2, 1, 1, 1, 1, 3, 1, 1),
    (1, 3, 1, 1, 1, 1, 5, 1, 1, 1),
    (1, 1, 1, 1, 9, 1, 1, 1),
    (2, 1, 1, 1, 11),
)
CODE = ((1, 4, 1, 1, 1, 8), (13, 3), (1, 1, 5, 1, 1, 6, 1), (6, 1, 9))
ARITHMETIC = (
    (1, 1, 5, 2, 1, 3, 1, 1, 1),
    (1, 1, 1, 1, 11, 1),
    (8, 1, 1, 1, 1, 1, 1, 1, 1),
    (4, 1, 1, 8, 2),
    (1, 3, 7, 1, 4),
    (2, *([1] * 14)),
    (1, 1, 1, 1, 1, 1, 2, 1, 3, 2, 1, 1),
    (8, 1, 1, 1, 3, 1, 1),
    (1, 5, 5, 3, 1, 1),
    (1,) * 16,
    (1, 4, 1, 5, 4, 1),
)
LOOP = ((16,), (15, 1), (6, 10))
PROFILES: dict[str, tuple[Schedule, ...]] = {
    "word_problem": WORD_PROBLEM,
    "fact": FACT,
    "code": CODE,
    "arithmetic": ARITHMETIC,
    "loop": LOOP,
    "mixed": WORD_PROBLEM + FACT + CODE + ARITHMETIC,
}

assert all(sum(block) == 16 for profile in PROFILES.values() for block in profile)


def draw_rows(profile: str, rows: int, blocks: int, seed: int) -> list[list[Schedule]]:
    """Schedules of `rows` rows of `blocks` blocks, drawn from a profile with equal chances."""
    draw = random.Random(seed)
    return [draw.choices(PROFILES[profile], k=blocks) for _ in range(rows)]


def replaying(rows: Sequence[Sequence[Schedule]]) -> Callable[[GenerationParams], CommitRule]:
    """A denoiser engine's `rule`: the row whose params have seed i replays rows[i], over and over,
    a block at a time."""
    blocks = [cycle(row) for row in rows]

    def rule(params: GenerationParams) -> CommitRule:
        assert params.seed is not None
        return ReplayRule(next(blocks[params.seed]))

    return rule


def lockstep_passes(rows: Sequence[Sequence[Schedule]], width: int) -> int:
    """Denoiser passes if `width` rows at a time start a block together and all wait for the last
    to end. Rows take turns, so that every round but the last is full."""
    width = min(width, len(rows))
    longest = max(map(len, rows))
    steps = [len(row[index]) for index in range(longest) for row in rows if index < len(row)]
    return sum(max(steps[start : start + width]) for start in range(0, len(steps), width))
