"""Pairs that lose what they get are avoided, probed, and taken back."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.deployments.conftest import Clock
from twotower.deployments.routing.breaker import FAILURES, REST_S, WINDOW_S, Breaker

PAIRS = ["a", "b", "c"]


@pytest.fixture
def pairs(clock: Clock) -> Breaker:
    return Breaker(clock)


def lose(pairs: Breaker, pair: str, times: int = FAILURES) -> None:
    for _ in range(times):
        pairs.lost(pair)


def ranks(pairs: Breaker, among: Sequence[str] = PAIRS, *, probe: bool = True) -> list[list[str]]:
    return pairs.ranked(among, probe=probe)


def test_one_loss_is_forgiven_and_two_are_not(pairs: Breaker) -> None:
    lose(pairs, "a", FAILURES - 1)
    assert ranks(pairs) == [PAIRS]
    lose(pairs, "a", 1)
    assert ranks(pairs) == [["b", "c"]]


def test_losses_far_apart_do_not_add_up(pairs: Breaker, clock: Clock) -> None:
    for _ in range(5):
        lose(pairs, "a", FAILURES - 1)
        clock.now += WINDOW_S + 1
    assert ranks(pairs) == [PAIRS]


def test_a_pair_is_probed_once_in_a_while(pairs: Breaker, clock: Clock) -> None:
    lose(pairs, "a")
    for _ in range(3):
        clock.now += REST_S
        assert ranks(pairs, probe=False) == [["b", "c"]]
        assert ranks(pairs) == [["a"], ["b", "c"]]
        assert ranks(pairs) == [["b", "c"]]
        lose(pairs, "a", 1)


def test_a_pair_that_works_is_taken_back(pairs: Breaker) -> None:
    lose(pairs, "a")
    assert [pairs.avoids(pair) for pair in PAIRS] == [True, False, False]
    pairs.worked("a")
    assert ranks(pairs) == [PAIRS]


def test_if_no_pair_works_all_are_tried(pairs: Breaker) -> None:
    for pair in PAIRS:
        lose(pairs, pair)
    assert ranks(pairs) == [PAIRS]
    assert ranks(pairs, ["a"]) == [["a"]]


def test_a_pair_that_is_gone_is_forgotten(pairs: Breaker) -> None:
    lose(pairs, "a")
    assert ranks(pairs, ["b", "c"]) == [["b", "c"]]
    assert ranks(pairs) == [PAIRS]
