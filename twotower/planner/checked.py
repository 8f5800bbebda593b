"""Tokens/s where the context tower checks drafts: by lookups alone, and with a denoiser."""

from __future__ import annotations

from collections.abc import Callable

from twotower.planner.drafts import accept_rate, yielded
from twotower.planner.passes import Passes
from twotower.planner.schedules import BLOCK
from twotower.towers.decoding.draft_policy import PASS_LENGTHS


def lookup_speed(passes: Passes, rows: int, prompt_s: float) -> Callable[[float], float]:
    """Tokens/s of `rows` rows with lookups in every round, by the tokens that a round with drafts
    of BLOCK - 1 tokens would yield. `prompt_s`: seconds of a row's prefill that fall on each token
    of its output.

    Drafts are as long as pays most. Shorter ones yield what a constant chance of every token says,
    and every row's part of a pass is taken to be as long as the longest, with a draft or without.
    """
    seconds = {length: passes.check(rows, length) for length in PASS_LENGTHS if length <= BLOCK}

    def speed(tokens: float) -> float:
        rate = accept_rate(tokens)
        found = {length: rows * yielded(rate, length) for length in seconds}
        return max(count / (seconds[length] + count * prompt_s) for length, count in found.items())

    return speed


def cycle_speed(cycle_s: float, rows: int, tokens: float, prompt_s: float) -> float:
    """Tokens/s of cycles of `cycle_s` seconds that yield every row `tokens`."""
    count = rows * tokens
    return count / (cycle_s + count * prompt_s)
