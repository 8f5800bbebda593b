"""Limits of a key, by a clock that the tests turn."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twotower.deployments.access.errors import RateLimitError
from twotower.deployments.access.limits import KeyLimits
from twotower.towers.errors import CapacityError


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def refused(limits: KeyLimits) -> RateLimitError:
    with pytest.raises(RateLimitError) as caught:
        limits.admit()
    return caught.value


def test_requests_at_a_time() -> None:
    limits = KeyLimits("ann", max_concurrent=2)
    first, second = limits.admit(), limits.admit()
    error = refused(limits)
    assert str(error) == "key 'ann': 2 requests run, expected at most 2"
    assert error.retry_after_s == 1.0
    assert isinstance(error, CapacityError)
    first.release()
    first.release()
    third = limits.admit()
    refused(limits)
    second.release()
    third.release()
    assert limits.running == 0


def test_a_request_that_fails_makes_room() -> None:
    limits = KeyLimits("ann", max_concurrent=1)
    with pytest.raises(ZeroDivisionError), limits.admit():
        raise ZeroDivisionError
    with limits.admit() as admission:
        refused(limits)
        admission.release()
        assert limits.running == 0
    assert limits.running == 0


def test_without_limits_everything_is_let_in() -> None:
    limits = KeyLimits("ann")
    for _ in range(100):
        limits.admit().charge(10**9)
    assert limits.running == 100


def test_tokens_a_minute() -> None:
    clock = Clock()
    limits = KeyLimits("ann", tokens_per_minute=600, clock=clock)
    with limits.admit() as admission:
        admission.charge(590)
        # A prompt's tokens are known before the output's: more than there are is charged, too.
        limits.admit().charge(110)
    error = refused(limits)
    assert str(error) == "key 'ann': its 600 tokens a minute are used up"
    # 100 below zero, 10 a second come.
    assert error.retry_after_s == pytest.approx(10.1)
    clock.now += 9.9
    refused(limits)
    clock.now += 0.2
    limits.admit()


def test_tokens_do_not_pile_up_and_refusals_cost_nothing() -> None:
    clock = Clock()
    limits = KeyLimits("ann", tokens_per_minute=60, clock=clock)
    clock.now += 3600
    limits.admit().charge(60)
    for _ in range(50):
        refused(limits)
    clock.now += 0.5
    limits.admit()
    assert limits.running == 2


def test_the_longest_hint_is_a_day() -> None:
    limits = KeyLimits("ann", tokens_per_minute=1)
    limits.admit().charge(10**9)
    assert refused(limits).retry_after_s == 86400


@given(st.integers(1, 10**6), st.lists(st.integers(0, 10**6), max_size=8), st.floats(0, 1e6))
def test_after_the_hinted_time_a_request_is_let_in(
    per_minute: int, charges: list[int], begun: float
) -> None:
    clock = Clock()
    clock.now = begun
    limits = KeyLimits("ann", tokens_per_minute=per_minute, clock=clock)
    admission = limits.admit()
    for tokens in charges:
        admission.charge(tokens)
    try:
        limits.admit()
    except RateLimitError as error:
        assert sum(charges) >= per_minute
        if error.retry_after_s < 86400:
            clock.now += error.retry_after_s
            limits.admit()


def test_the_hint_survives_a_process() -> None:
    error = pickle.loads(pickle.dumps(RateLimitError("full", 2.5)))
    assert (type(error), str(error), error.retry_after_s) == (RateLimitError, "full", 2.5)
