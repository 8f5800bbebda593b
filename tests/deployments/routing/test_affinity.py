"""Prompts that begin alike stay together, without overloading a pair."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from twotower.deployments.routing.affinity import PREFIX_TOKENS, SLACK_ROWS, preferred_pair

PAIRS = [f"pair-{number}" for number in range(5)]


def prompt_of(seed: int, tokens: int = PREFIX_TOKENS) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(1000) for _ in range(tokens)]


def test_prompts_that_begin_alike_have_one_pair_whatever_follows() -> None:
    for seed in range(50):
        own = preferred_pair(prompt_of(seed), PAIRS, {})
        assert own in PAIRS
        assert preferred_pair([*prompt_of(seed), 7, 8], PAIRS[::-1], {}) == own


def test_different_prompts_spread() -> None:
    counts = Counter(preferred_pair(prompt_of(seed), PAIRS, {}) for seed in range(1000))
    assert set(counts) == set(PAIRS)
    assert max(counts.values()) < 2 * min(counts.values())


def test_a_pair_that_goes_moves_only_its_own_prompts() -> None:
    for seed in range(200):
        own = preferred_pair(prompt_of(seed), PAIRS, {})
        rest = [pair for pair in PAIRS if pair != PAIRS[2]]
        if own != PAIRS[2]:
            assert preferred_pair(prompt_of(seed), rest, {}) == own


def test_short_prompts_belong_nowhere() -> None:
    assert preferred_pair(prompt_of(1, PREFIX_TOKENS - 1), PAIRS, {}) is None
    assert preferred_pair(prompt_of(1), [], {}) is None


@pytest.mark.parametrize("least", [0, 8, 40])
def test_a_pair_with_many_more_rows_than_another_is_passed_over(least: int) -> None:
    prompt = prompt_of(3)
    own = preferred_pair(prompt, PAIRS, {})
    assert own is not None
    most = int(least * 1.25) + SLACK_ROWS
    rows = dict.fromkeys(PAIRS, least)
    assert preferred_pair(prompt, PAIRS, {**rows, own: most}) == own
    assert preferred_pair(prompt, PAIRS, {**rows, own: most + 1}) is None
