"""Pairs that lose what they get are avoided, probed, and taken back."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from twotower.deployments import breaker, pair_chooser
from twotower.deployments.breaker import FAILURES, REST_S, WINDOW_S, Breaker
from twotower.deployments.pair import Job
from twotower.deployments.pair_chooser import PairChooser
from twotower.towers.params import GenerationParams

PAIRS = ["a", "b", "c"]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pairs(clock: Clock) -> Breaker:
    return Breaker(clock)


def lose(pairs: Breaker, pair: str, times: int = FAILURES) -> None:
    for number in range(times):
        pairs.routed(f"row-{number}", pair)
        pairs.lost(f"row-{number}")
        pairs.ended(f"row-{number}")


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


def test_a_loss_is_expected_of_a_pair_that_was_avoided_when_it_got_the_attempt(
    pairs: Breaker,
) -> None:
    """Those that went down together with the pair may each have been the reason."""
    for row in ("1", "2", "3"):
        pairs.routed(row, "a")
    assert [pairs.lost(row) for row in ("1", "2", "3")] == [False] * 3
    pairs.routed("4", "a")
    assert pairs.lost("4")
    pairs.routed("5", "b")
    assert not pairs.lost("5")


def test_a_pair_is_probed_once_in_a_while(pairs: Breaker, clock: Clock) -> None:
    lose(pairs, "a")
    for _ in range(3):
        clock.now += REST_S
        assert ranks(pairs, probe=False) == [["b", "c"]]
        assert ranks(pairs) == [["a"], ["b", "c"]]
        assert ranks(pairs) == [["b", "c"]]
        lose(pairs, "a", 1)


def test_a_probe_that_works_takes_the_pair_back(pairs: Breaker, clock: Clock) -> None:
    lose(pairs, "a")
    clock.now += REST_S
    assert ranks(pairs)[0] == ["a"]
    pairs.routed("probe", "a")
    pairs.worked("probe")
    assert ranks(pairs) == [PAIRS]


def test_a_probe_that_was_cancelled_says_nothing(pairs: Breaker, clock: Clock) -> None:
    lose(pairs, "a")
    clock.now += REST_S
    ranks(pairs)
    pairs.routed("probe", "a")
    pairs.ended("probe")
    assert ranks(pairs) == [["b", "c"]]
    clock.now += REST_S
    assert ranks(pairs)[0] == ["a"]


def test_if_no_pair_works_all_are_tried(pairs: Breaker) -> None:
    for pair in PAIRS:
        lose(pairs, pair)
    assert ranks(pairs) == [PAIRS]
    assert ranks(pairs, ["a"]) == [["a"]]


def test_a_pair_that_is_gone_is_forgotten(pairs: Breaker) -> None:
    lose(pairs, "a")
    assert ranks(pairs, ["b", "c"]) == [["b", "c"]]
    assert ranks(pairs) == [PAIRS]


def test_attempts_that_nobody_routed_say_nothing(pairs: Breaker) -> None:
    """As in local testing mode, where Serve chooses nothing."""
    for _ in range(FAILURES):
        pairs.lost("row")
        pairs.worked("row")
        pairs.ended("row")
    assert ranks(pairs) == [PAIRS]


def replica(name: str) -> Any:
    return SimpleNamespace(replica_id=SimpleNamespace(unique_id=name))


def call(*arguments: object) -> Any:
    return SimpleNamespace(args=list(arguments))


async def test_serve_is_given_two_of_those_that_work(
    pairs: Breaker, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(breaker, "PAIRS", pairs)
    chooser = PairChooser.__new__(PairChooser)
    replicas = [replica(name) for name in PAIRS]
    job = call(Job("row-7", (5,), (), GenerationParams()))

    async def chosen(request: Any) -> list[set[str]]:
        ranked = await chooser.choose_replicas(replicas, request)
        return [{found.replica_id.unique_id for found in rank} for rank in ranked]

    assert [len(rank) for rank in await chosen(job)] == [pair_chooser.CHOICES]
    for _ in range(FAILURES):
        chooser.on_request_routed(job, replicas[0].replica_id, None)
        pairs.lost("row-7")
    clock.now += REST_S
    for other in (call(), call([4, 5]), None):
        assert await chosen(other) == [{"b", "c"}]
    assert await chosen(job) == [{"a"}, {"b", "c"}]
    assert await chosen(job) == [{"b", "c"}]
