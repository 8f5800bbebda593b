"""A pair's load as gauges of Ray's own metrics, for Prometheus and dashboards."""

from __future__ import annotations

from collections.abc import Mapping

from ray.util.metrics import Gauge

Stats = Mapping[str, Mapping[str, float]]

GAUGES = {
    "rows": "Rows that are open or wait for room.",
    "queued_rows": "Rows that wait for a slot and pages.",
    "slots_used": "Slots of Mamba states in use.",
    "pages_used": "Pages of K/V in use, the prefix cache's included.",
    "state_bytes": "Bytes of slots and pages in use.",
    "cache_hits": "Prompts of which the prefix cache had a part.",
    "busy_share": "Share of the time since the last report that the tower spent in passes.",
}


def busy_share(before: Mapping[str, float], now: Mapping[str, float]) -> float:
    """Share of the time between two readings of a tower's stats that it spent in passes."""
    elapsed = now["clock_seconds"] - before["clock_seconds"]
    return (now["pass_seconds"] - before["pass_seconds"]) / elapsed if elapsed > 0 else 0.0


class PairMetrics:
    """Gauges `twotower_*`, one value per tower; Ray adds the replica's own tags."""

    def __init__(self) -> None:
        self._gauges = {
            name: Gauge(f"twotower_{name}", description, tag_keys=("tower",))
            for name, description in GAUGES.items()
        }
        self._eased = Gauge(
            "twotower_eased", "Share of the way to their floors on which rows begin now."
        )
        self._last: dict[str, Mapping[str, float]] = {}

    def report(self, stats: Stats, eased: float) -> None:
        """Sets every gauge that a tower's stats have a value for, and that of the dial."""
        self._eased.set(eased)
        for tower, values in stats.items():
            known = {**values, "busy_share": busy_share(self._last.get(tower, values), values)}
            self._last[tower] = values
            for name, gauge in self._gauges.items():
                if name in known:
                    gauge.set(known[name], tags={"tower": tower})
