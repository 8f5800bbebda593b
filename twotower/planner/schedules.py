"""Commit schedules: the number of tokens that each step of a 16-token block committed.

Measured at threshold 0.8, 16 steps, temperature 0 on the released 30B model by the public
reproduction junze-eng/twotower-repro; a tuple is a block. Random weights replay them, since their
confidences mean nothing. Profiles whose mean was published, but whose blocks were not, are made of
recorded blocks of other texts, chosen so that the mean number of steps is the published mean.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import cycle

from twotower.towers.decoding.unmasking import CommitRule, ReplayRule
from twotower.towers.request.params import GenerationParams

Schedule = tuple[int, ...]

BLOCK = 16
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

# Open prompts whose output does not repeat itself: 1.32 tokens a pass, so 12 steps a block. The
# recorded blocks of 14, 12, 10 and 12 steps.
PROSE = (WORD_PROBLEM[0], FACT[0], FACT[1], ARITHMETIC[6])
# HumanEval at 2.44 tokens a pass, so 6.5 steps. The four recorded blocks of code have 4.5, so two
# of arithmetic, of 9 and 12 steps, are added.
CODE_LONG = (*CODE, ARITHMETIC[0], ARITHMETIC[6])
# The released model's 2.42x at equal cost of a pass: 2.85 tokens a pass, 5.6 steps. Ten recorded
# blocks of all texts with 56 steps: code's four, two word problems, three of arithmetic, one fact.
HEADLINE = (
    *CODE,
    WORD_PROBLEM[1],
    WORD_PROBLEM[3],
    ARITHMETIC[4],
    ARITHMETIC[7],
    ARITHMETIC[10],
    FACT[2],
)
PROFILES: dict[str, tuple[Schedule, ...]] = {
    "prose": PROSE,
    "word_problem": WORD_PROBLEM,
    "fact": FACT,
    "code": CODE_LONG,
    "arithmetic": ARITHMETIC,
    "headline": HEADLINE,
    "loop": LOOP,
    "mixed": WORD_PROBLEM + FACT + CODE + ARITHMETIC,
}

assert all(sum(block) == BLOCK for profile in PROFILES.values() for block in profile)


def draw_rows(profile: str, rows: int, blocks: int, seed: int) -> list[list[Schedule]]:
    """Schedules of `rows` rows of `blocks` blocks, drawn from a profile with equal chances."""
    draw = random.Random(seed)
    return [draw.choices(PROFILES[profile], k=blocks) for _ in range(rows)]


def shuffled_rows(profile: str, rows: int, seed: int, *, in_step: bool) -> list[list[Schedule]]:
    """A whole profile for each row, shuffled, so that any round of it has the profile's mean;
    `in_step` gives all rows the same order, so that they end every block together."""
    draw = random.Random(seed)
    orders = [draw.sample(PROFILES[profile], k=len(PROFILES[profile])) for _ in range(rows)]
    return orders[:1] * rows if in_step else orders


def mean_steps(blocks: Sequence[Schedule]) -> float:
    """Denoiser passes per block."""
    return sum(map(len, blocks)) / len(blocks)


def masked_share(blocks: Sequence[Schedule]) -> float:
    """The share of a block's positions that is still masked, averaged over all passes: those are
    the positions that go through the head."""
    masked = [
        (sum(block) - sum(block[:step])) / sum(block)
        for block in blocks
        for step in range(len(block))
    ]
    return sum(masked) / len(masked)


class Replay:
    """The `rule` of a denoiser engine that replays schedules, a block at a time: a row whose params
    have seed i repeats rows[i]. The schedules can be changed between runs."""

    def __init__(self, rows: Sequence[Sequence[Schedule]] = ()) -> None:
        self.load(rows)

    def load(self, rows: Sequence[Sequence[Schedule]]) -> None:
        """Replaces the schedules of all rows."""
        self._blocks = [cycle(row) for row in rows]

    def __call__(self, params: GenerationParams) -> CommitRule:
        assert params.seed is not None
        return ReplayRule(next(self._blocks[params.seed]))


def lockstep_passes(rows: Sequence[Sequence[Schedule]], width: int) -> int:
    """Denoiser passes if `width` rows at a time start a block together and all wait until the last
    of them has ended it. Rows take turns, so that every round but the last is full."""
    width = min(width, len(rows))
    longest = max(map(len, rows))
    steps = [len(row[index]) for index in range(longest) for row in rows if index < len(row)]
    return sum(max(steps[start : start + width]) for start in range(0, len(steps), width))
