"""What drafts cost a row: medians of its shares of the passes and of the time beside them."""

from __future__ import annotations

import pytest

from twotower.towers.decoding.draft_times import DraftTimes
from twotower.towers.decoding.services import DraftCosts, PassTime


def test_nothing_is_known_at_first() -> None:
    times = DraftTimes()
    times.note("checked", [], 5.0)
    assert times.costs() == DraftCosts(None, None)


def test_a_row_pays_its_share_of_the_passes_and_of_the_calls() -> None:
    times = DraftTimes()
    # Two passes of 4 rows: 0.2 s and 0.4 s, and 0.2 s of calls beside them.
    times.note("checked", [PassTime(0.2, 64, 4), PassTime(0.4, 64, 4)], 0.8)
    assert times.costs().checked == pytest.approx((0.2 + 0.4 + 0.2) / 4)
    # A clock that is coarser than the passes gives no negative time.
    times.note("whole", [PassTime(1.0, 16, 1)], 0.5)
    assert times.costs().whole == pytest.approx(1.0)


def test_one_slow_draft_changes_little() -> None:
    times = DraftTimes()
    for seconds in (0.1, 9.0, 0.1, 0.1, 0.2):
        times.note("checked", [PassTime(seconds, 16, 1)], seconds)
    assert times.costs().of("checked") == pytest.approx(0.1)
    for _ in range(20):
        times.note("checked", [PassTime(3.0, 16, 1)], 3.0)
    assert times.costs().of("checked") == pytest.approx(3.0)
