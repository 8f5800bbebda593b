"""The gauges of a pair's load."""

from __future__ import annotations

from typing import ClassVar

import pytest

from twotower.deployments.pair import metrics
from twotower.deployments.pair.metrics import PairMetrics, busy_share


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


def test_the_busy_share_is_that_of_the_window() -> None:
    before = {"clock_seconds": 100.0, "pass_seconds": 50.0}
    now = {"clock_seconds": 110.0, "pass_seconds": 54.0}
    assert busy_share(before, now) == pytest.approx(0.4)
    assert busy_share(now, now) == 0.0


def test_gauges_follow_the_stats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "Gauge", Recorded)
    report = PairMetrics()
    first = {"rows": 3.0, "queued_rows": 2.0, "clock_seconds": 10.0, "pass_seconds": 1.0}
    report.report({"context": first, "denoiser": {**first, "rows": 1.0}}, eased=0.0)
    later = {**first, "rows": 0.0, "clock_seconds": 12.0, "pass_seconds": 2.5}
    report.report({"context": later}, eased=0.25)
    assert Recorded.values == {
        ("twotower_eased", "pair"): 0.25,
        ("twotower_rows", "context"): 0.0,
        ("twotower_queued_rows", "context"): 2.0,
        ("twotower_busy_share", "context"): 0.75,
        ("twotower_rows", "denoiser"): 1.0,
        ("twotower_queued_rows", "denoiser"): 2.0,
        ("twotower_busy_share", "denoiser"): 0.0,
    }
