"""A pair's load: as metrics, for Prometheus and dashboards, and as the signals from which the
number of pairs is decided."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from ray import serve

from twotower.deployments.telemetry.instruments import Instruments, open_instruments
from twotower.deployments.telemetry.names import PAIR
from twotower.towers.engine.stats import EngineStats

# Counters of each tower of a pair, by the tower's name: "context", "denoiser".
PairStats = Mapping[str, EngineStats]

# Metrics of a tower by the names of its counters, beside those of the same name.
GAUGES = {
    **{name: name for name in ("rows", "queued_rows", "slots", "slots_used", "state_bytes")},
    "prefix_cache_entries": "cache_entries",
    "prefix_cache_bytes": "cache_bytes",
}
# Gauges of the links by transport.
LINKS = {name: f"{name}_links" for name in ("grpc", "gloo", "nccl")}
COUNTERS = {
    "passes_total": "passes",
    "pass_rows_total": "pass_rows",
    "pass_tokens_total": "pass_tokens",
    "pass_seconds_total": "pass_seconds",
    "prefix_cache_prompt_hits_total": "cache_hits",
    "prefix_cache_prompt_misses_total": "cache_misses",
    "state_transfers_total": "transfers",
    "state_transfer_bytes_total": "transfer_bytes",
    "state_transfer_seconds_total": "transfer_seconds",
}


class PairMetrics:
    """The metrics of the pair `pair` of a service of `model`, one value per tower."""

    def __init__(self, model: str, pair: str, instruments: Instruments | None = None) -> None:
        self._labels = {"model": model, "pair": pair}
        self._to = instruments or open_instruments(PAIR)
        self._last: dict[str, EngineStats] = {}

    @classmethod
    def of_replica(cls, model: str) -> PairMetrics:
        """Those of the Serve replica that this process is."""
        return cls(model, serve.get_replica_context().replica_id.unique_id)

    def report(self, stats: PairStats, eased: float) -> None:
        """Sets and adds what a tower has a value for, and sets the overload dial."""
        self._to.set("eased", eased, self._labels)
        for tower, now in stats.items():
            before = self._last.get(tower)
            self._last[tower] = now
            self._gauges(tower, now, now if before is None else before)
            self._counters(tower, now, before)

    def _gauges(self, tower: str, now: EngineStats, before: EngineStats) -> None:
        known = now.report()
        values = {name: known[own] for name, own in GAUGES.items() if own in known}
        values["busy_share"] = now.busy_share_since(before)
        if now.pages and now.pages_used is not None:
            values["kv_cache_usage_perc"] = now.pages_used / now.pages
        labels = {**self._labels, "tower": tower}
        for name, value in values.items():
            self._to.set(name, value, labels)
        for transport, own in LINKS.items():
            if own in known:
                self._to.set("state_links", known[own], {**labels, "transport": transport})

    def _counters(self, tower: str, now: EngineStats, before: EngineStats | None) -> None:
        known, last = now.report(), {} if before is None else before.report()
        for name, own in COUNTERS.items():
            if own in known:
                # A tower that was started anew counts from 0 again.
                grown = known[own] - last.get(own, 0)
                added = known[own] if grown < 0 else grown
                self._to.add(name, added, {**self._labels, "tower": tower})


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
