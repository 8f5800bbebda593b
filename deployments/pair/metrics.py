"""A pair's load: as gauges of Ray's own metrics, for Prometheus and dashboards, and as the signals
from which the number of pairs is decided."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from ray.util.metrics import Gauge

from twotower.towers.engine.stats import EngineStats

# Counters of each tower of a pair, by the tower's name: "context", "denoiser".
PairStats = Mapping[str, EngineStats]

GAUGES = {
    "rows": "Rows that are open or wait for room.",
    "queued_rows": "Rows that wait for a slot and pages.",
    "slots_used": "Slots of Mamba states in use.",
    "pages_used": "Pages of K/V in use, the prefix cache's included.",
    "state_bytes": "Bytes of slots and pages in use.",
    "cache_hits": "Prompts of which the prefix cache had a part.",
    "busy_share": "Share of the time since the last report that the tower spent in passes.",
}


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
        self._last: dict[str, EngineStats] = {}

    def report(self, stats: PairStats, eased: float) -> None:
        """Sets every gauge that a tower has a value for, and that of the overload dial."""
        self._eased.set(eased)
        for tower, now in stats.items():
            busy = now.busy_share_since(self._last.get(tower, now))
            self._last[tower] = now
            known = {**now.report(), "busy_share": busy}
            for name, gauge in self._gauges.items():
                if name in known:
                    gauge.set(known[name], tags={"tower": tower})


def signals(before: PairStats, now: PairStats) -> dict[str, float]:
    """A pair's load by the names of PairSignals, from two readings; what is not known is left out.

    The towers are the context tower and any number of denoiser towers.
    """
    context = now["context"]
    denoisers = {name: tower for name, tower in now.items() if name != "context"}
    queued = max(context.queued_rows, sum(tower.queued_rows for tower in denoisers.values()))
    free: float = (context.slots or 0) - (context.slots_used or 0)
    if denoisers:
        free = min(free, sum(_free_rows(tower) for tower in denoisers.values()))
    found = {
        "rows": max(0.0, context.rows - queued),
        "queued_rows": queued,
        "free_slots": free,
        "context_pass_s": _pass_s(before, now, ["context"]),
        "denoiser_pass_s": _pass_s(before, now, denoisers),
        "passes": context.passes,
    }
    return {name: float(value) for name, value in found.items() if math.isfinite(value)}


def _free_rows(denoiser: EngineStats) -> float:
    """Rows that find a slot, and pages: each as many as the present rows have.

    A denoiser without memory of its own has room for every row of the context tower, whose pages
    say less: cached prefixes fill them and give way to rows.
    """
    if denoiser.slots is None or denoiser.pages is None:
        return math.inf
    rows, used = denoiser.slots_used or 0, denoiser.pages_used or 0
    by_pages = (denoiser.pages - used) * rows / used if rows and used else math.inf
    return min(denoiser.slots - rows, by_pages)


def _pass_s(before: PairStats, now: PairStats, towers: Iterable[str]) -> float:
    """Mean seconds of the passes between two readings; NaN if there was none."""
    names = list(towers)
    passes = sum(now[name].passes - before[name].passes for name in names)
    seconds = sum(now[name].pass_seconds - before[name].pass_seconds for name in names)
    return seconds / passes if passes > 0 else math.nan
