"""What a pass costs a row, from the passes that ran."""

from __future__ import annotations

import pytest

from twotower.towers.decoding.pass_times import PassTimes
from twotower.towers.decoding.services import PassTime


def times_of(*passes: tuple[float, int, int], repeats: int = 60) -> PassTimes:
    """Times of passes (seconds, tokens, rows), each seen several times in turn."""
    times = PassTimes()
    for _ in range(repeats):
        for seconds, tokens, rows in passes:
            times.note(PassTime(seconds, tokens, rows))
    return times


def test_all_passes_cost_the_same_while_nothing_is_known() -> None:
    times = PassTimes()
    assert not times.known
    assert times.cost(1) == times.cost(16) == 1.0


def test_costs_lie_on_a_line_between_what_was_seen() -> None:
    times = times_of((1.0, 1, 1), (4.0, 16, 1))
    assert times.known
    assert times.cost(1) == pytest.approx(1.0)
    assert times.cost(16) == pytest.approx(4.0)
    assert times.cost(6) == pytest.approx(2.0)
    assert times.cost(64) == pytest.approx(4.0)


def test_rows_share_a_pass() -> None:
    times = times_of((2.0, 16, 16), (8.0, 256, 16))
    assert times.rows == pytest.approx(16, rel=0.01)
    assert times.cost(1) == pytest.approx(2.0 / 16, rel=0.01)
    assert times.cost(16) == pytest.approx(8.0 / 16, rel=0.01)


def test_passes_of_as_many_rows_count() -> None:
    # 16 tokens of one row are another pass than one token of each of 16 rows.
    times = times_of((1.0, 1, 1), (2.0, 16, 1))
    for _ in range(60):
        times.note(PassTime(9.0, 16, 16))
    assert times.cost(1) == pytest.approx(9.0 / 16, rel=0.02)
    for _ in range(90):
        times.note(PassTime(2.0, 16, 1))
    assert times.cost(16) == pytest.approx(2.0, rel=0.02)


def test_noise_and_prefill_change_nothing() -> None:
    times = times_of((1.0, 1, 1), (2.0, 16, 1))
    times.note(PassTime(50.0, 1, 1))
    for _ in range(40):
        times.note(PassTime(50.0, 16, 1, prefill_tokens=15))
    assert times.cost(1) == pytest.approx(1.0)
    assert times.cost(16) == pytest.approx(2.0)


def test_a_larger_pass_never_costs_less() -> None:
    times = times_of((1.2, 1, 1), (1.0, 4, 1), (3.0, 16, 1))
    costs = [times.cost(tokens) for tokens in range(1, 17)]
    assert costs == sorted(costs)


def test_costs_follow_the_load() -> None:
    times = times_of((1.0, 1, 1))
    for _ in range(20):
        times.note(PassTime(2.0, 1, 1))
    assert times.cost(1) == pytest.approx(2.0)
