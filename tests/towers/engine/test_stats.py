"""Counters of several engines together."""

from __future__ import annotations

from dataclasses import replace

import pytest

from twotower.towers.engine.stats import EngineStats

STATS = EngineStats(
    rows=3,
    queued_rows=1,
    pending_work=2,
    passes=4,
    pass_rows=8,
    pass_tokens=64,
    prefill_tokens=16,
    pass_seconds=1.0,
    clock_seconds=10.0,
    busy_share=0.5,
    slots=8,
    slots_used=2,
)


def test_counts_add_up_and_times_have_a_mean() -> None:
    other = replace(STATS, rows=5, passes=6, pass_seconds=3.0, busy_share=0.1, slots_used=7)
    both = EngineStats.merged([STATS, other])
    assert (both.rows, both.queued_rows, both.passes) == (8, 2, 10)
    assert (both.slots, both.slots_used) == (16, 9)
    assert (both.pass_seconds, both.clock_seconds) == (2.0, 10.0)
    assert both.busy_share == pytest.approx(0.3)
    assert EngineStats.merged([STATS]) == STATS


def test_what_an_engine_has_not_is_left_out() -> None:
    assert STATS.cache_hits is None
    report = STATS.report()
    assert report["slots_used"] == 2
    assert "cache_hits" not in report
    without = replace(STATS, slots=None)
    assert EngineStats.merged([STATS, without]).slots is None


def test_two_readings_give_the_busy_share_between_them() -> None:
    later = replace(STATS, clock_seconds=12.0, pass_seconds=1.5)
    assert later.busy_share_since(STATS) == pytest.approx(0.25)
    assert STATS.busy_share_since(STATS) == 0.0
