"""The load of a pair, as gauges and as signals."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest

from twotower.deployments.pair import metrics
from twotower.deployments.pair.autoscaling import PairSignals
from twotower.deployments.pair.metrics import PairMetrics, signals
from twotower.towers.engine.stats import EngineStats


class Recorded:
    """Stands in for Ray's gauge, which needs a cluster."""

    values: ClassVar[dict[tuple[str, str], float]] = {}

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...] = ()) -> None:
        assert description.endswith(".")
        self.per_tower = tag_keys == ("tower",)
        self.name = name

    def set(self, value: float, tags: dict[str, str] | None = None) -> None:
        assert (tags is not None) == self.per_tower
        self.values[self.name, tags["tower"] if tags is not None else "pair"] = value


def stats(**changed: float) -> EngineStats:
    """STATS with some others."""
    return replace(STATS, **changed)  # type: ignore[arg-type]


STATS = EngineStats(
    rows=5,
    queued_rows=0,
    pending_work=0,
    passes=10,
    pass_rows=50,
    pass_tokens=500,
    prefill_tokens=0,
    pass_seconds=1.0,
    clock_seconds=10.0,
    busy_share=0.1,
    slots=8,
    slots_used=5,
    pages=100,
    pages_used=20,
)


def test_gauges_follow_the_stats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "Gauge", Recorded)
    report = PairMetrics()
    alone = replace(STATS, slots=None, slots_used=None, pages=None, pages_used=None)
    first = replace(alone, rows=3, queued_rows=2, slots_used=4)
    report.report({"context": first, "denoiser": replace(alone, rows=1)}, eased=0.0)
    later = replace(first, rows=0, clock_seconds=12.0, pass_seconds=2.5)
    report.report({"context": later}, eased=0.25)
    assert Recorded.values == {
        ("twotower_eased", "pair"): 0.25,
        ("twotower_rows", "context"): 0,
        ("twotower_queued_rows", "context"): 2,
        ("twotower_slots_used", "context"): 4,
        ("twotower_busy_share", "context"): 0.75,
        ("twotower_rows", "denoiser"): 1,
        ("twotower_queued_rows", "denoiser"): 0,
        ("twotower_busy_share", "denoiser"): 0.0,
    }


def test_signals_say_what_two_readings_show() -> None:
    before = {"context": stats(), "denoiser": stats()}
    now = {
        "context": stats(rows=7, queued_rows=2, passes=14, pass_seconds=1.2, pages_used=99),
        "denoiser": stats(pages_used=60, passes=10),
    }
    found = signals(before, now)
    assert found == {
        "rows": 5,
        "queued_rows": 2,
        # 12 pages a row, 40 left: three rows, as many as there are slots.
        "free_slots": 3,
        "context_pass_s": pytest.approx(0.05),
        "passes": 14,
    }
    now["denoiser"] = replace(now["denoiser"], pages_used=90)
    assert signals(before, now)["free_slots"] == pytest.approx(10 / 18)
    assert set(found) <= set(PairSignals._fields)


def test_signals_of_one_context_tower_alone_or_with_several_denoisers() -> None:
    alone = {"context": stats()}
    assert signals(alone, alone) == {"rows": 5, "queued_rows": 0, "free_slots": 3, "passes": 10}
    several = {
        "context": stats(slots=16, rows=9, slots_used=9),
        "denoiser": stats(slots_used=4),
        "denoiser_1": stats(slots_used=6),
    }
    later = {name: replace(t, passes=12, pass_seconds=1.5) for name, t in several.items()}
    later["denoiser_1"] = stats(slots_used=6, passes=14, pass_seconds=1.3, queued_rows=1)
    found = signals(several, later)
    assert (found["rows"], found["queued_rows"], found["free_slots"]) == (8, 1, 4 + 2)
    assert found["denoiser_pass_s"] == pytest.approx((0.5 + 0.3) / (2 + 4))


def test_a_denoiser_that_shares_the_context_towers_memory_has_room_as_it_has() -> None:
    shared = stats(slots=None, slots_used=None, pages=None, pages_used=None)
    towers = {"context": stats(), "denoiser": shared}
    assert signals(towers, towers)["free_slots"] == 3
