"""Tokens that a denoiser pass commits: by threshold and kind of text, and block by block."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from twotower.planner.schedules import BLOCK, LOOP, PROFILES, Schedule
from twotower.towers.errors import ConfigError

# Tokens per denoiser pass of the released model at 16 steps and temperature 0, by threshold, as the
# public reproduction junze-eng/twotower-repro measured them. At threshold 1 no confidence exceeds
# it, so every pass commits one token: that is the rule, not a measurement.
TOKENS_PER_NFE: dict[str, dict[float, float]] = {
    "plain": {0.5: 1.79, 0.7: 1.48, 0.8: 1.32, 0.9: 1.19, 0.95: 1.12, 1.0: 1.0},
    "open": {0.5: 2.04, 0.7: 1.68, 0.8: 1.52, 0.9: 1.34, 0.95: 1.25, 1.0: 1.0},
    "code": {0.8: 2.35},
    "arithmetic": {0.8: 3.11, 0.9: 2.51, 0.95: 2.06, 1.0: 1.0},
}
TEXTS = {
    "plain": "open prompts, outputs that do not repeat themselves",
    "open": "open prompts, all outputs",
    "code": "HumanEval, outputs that do not repeat themselves",
    "arithmetic": "word problems of a few lines",
}
_RECORDED = (*PROFILES["mixed"], *LOOP)


def tokens_per_nfe(text: str, gamma: float) -> float:
    """Tokens per denoiser pass at threshold `gamma`, interpolated between measured thresholds.

    Raises ConfigError for an unknown kind of text and outside of the measured thresholds.
    """
    if text not in TOKENS_PER_NFE:
        raise ConfigError(f"text: got {text!r}, expected one of {', '.join(TOKENS_PER_NFE)}")
    known = sorted(TOKENS_PER_NFE[text].items())
    lowest, highest = known[0][0], known[-1][0]
    if not lowest <= gamma <= highest:
        raise ConfigError(
            f"gamma: got {gamma:g}, expected {lowest:g} to {highest:g}, as measured for text "
            f"{text!r}; give tokens_per_nfe instead"
        )
    above = next(index for index, (at, _) in enumerate(known) if at >= gamma)
    (high, value), (low, before) = known[above], known[max(0, above - 1)]
    if high == low:
        return value
    return before + (value - before) * (gamma - low) / (high - low)


def steps_for(tokens: float) -> float:
    """Denoiser passes per block at `tokens` per pass. Raises ConfigError outside of 1 to 16."""
    if not 1.0 <= tokens <= BLOCK:
        raise ConfigError(f"tokens_per_nfe: got {tokens:g}, expected 1 to {BLOCK}")
    return BLOCK / tokens


def rows_of_blocks(steps: float, rows: int, blocks: int, seed: int = 0) -> list[list[Schedule]]:
    """Recorded schedules for `rows` rows of `blocks` blocks each, with `steps` passes per block in
    the mean. A schedule is weighted by a constant to the power of its number of steps."""
    chances = _chances(steps)
    draw = random.Random(seed)
    # Evenly spaced over the weights, within a row and over all rows: every row has nearly the mean
    # itself, and all of them have it.
    offsets = [(place + 0.5) / rows for place in range(rows)]
    draw.shuffle(offsets)
    found = []
    for offset in offsets:
        row = _spread(chances, blocks, offset)
        draw.shuffle(row)
        found.append(row)
    return found


def _spread(chances: Sequence[float], count: int, offset: float) -> list[Schedule]:
    """`count` schedules at evenly spaced points of the cumulated chances, from `offset` (0 to 1)
    of a space on."""
    picked = []
    total, index = chances[0], 0
    for place in range(count):
        while total < (place + offset) / count and index < len(chances) - 1:
            index += 1
            total += chances[index]
        picked.append(_RECORDED[index])
    return picked


def _chances(steps: float) -> list[float]:
    """The chance of each recorded schedule for a mean of `steps`, by bisection."""
    low, high = -8.0, 8.0
    for _ in range(60):
        tilt = (low + high) / 2
        chances = _tilted(tilt)
        mean = sum(p * len(block) for p, block in zip(chances, _RECORDED, strict=True))
        low, high = (tilt, high) if mean < steps else (low, tilt)
    return chances


def _tilted(tilt: float) -> list[float]:
    weights = [math.exp(tilt * (len(block) - BLOCK)) for block in _RECORDED]
    return [weight / sum(weights) for weight in weights]
