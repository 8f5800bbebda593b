"""Commit schedules: how many tokens each step of a 16-token block committed.

Measured at threshold 0.8, 16 steps, temperature 0 on the released 30B model by the public
reproduction junze-eng/twotower-repro; one tuple a block. Random weights replay them, since their
own confidences mean nothing.
"""

from __future__ import annotations

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
PROFILES: dict[str, tuple[tuple[int, ...], ...]] = {
    "word_problem": WORD_PROBLEM,
    "fact": FACT,
    "code": CODE,
    "arithmetic": ARITHMETIC,
    "loop": LOOP,
    "mixed": WORD_PROBLEM + FACT + CODE + ARITHMETIC,
}

assert all(sum(block) == 16 for profile in PROFILES.values() for block in profile)
