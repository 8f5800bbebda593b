"""Figures of a time of a fleet: waits, imbalance, prefixes, and what went on elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.fleet.fleet import Fleet


class Mark(NamedTuple):
    """What a fleet has counted up to a time."""

    at: float
    tokens: int
    cached: int
    ideal: int
    reissues: int
    moves: int
    cut: int
    pauses: tuple[int, ...]


def mark(fleet: Fleet) -> Mark:
    """The counts of now."""
    prefixes, routers = fleet.prefixes, fleet.routers
    return Mark(
        fleet.agenda.now,
        prefixes.tokens,
        prefixes.cached,
        prefixes.ideal,
        sum(router.reissues for router in routers),
        sum(router.moves for router in routers),
        fleet.cut,
        tuple(len(router.pauses) for router in routers),
    )


def between(fleet: Fleet, begin: Mark, end: Mark) -> dict[str, Any]:
    """Figures of a time: of the requests whose first block came in it, of the pairs each time that
    they reported, and of the prompts that were begun."""
    waits = [
        request.first_block_at - request.came
        for request in (*fleet.ended, *fleet.open)
        if request.first_block_at is not None and begin.at <= request.first_block_at < end.at
    ]
    pauses = [
        pause
        for router, first, last in zip(fleet.routers, begin.pauses, end.pauses, strict=True)
        for pause in router.pauses[first:last]
    ]
    samples = [sample for sample in fleet.samples if begin.at < sample.at <= end.at]
    tokens = max(1, end.tokens - begin.tokens)
    return {
        "seconds": round(end.at - begin.at, 1),
        "requests": len(waits),
        "first_block_s": percentiles(waits),
        "rows_max_over_mean": middle([sample.most / max(sample.mean, 1e-9) for sample in samples]),
        "rows_p99_over_median": middle([sample.p99 / max(1, sample.median) for sample in samples]),
        "most_queued_rows": max((sample.queued for sample in samples), default=0),
        "prefix_hits": round((end.cached - begin.cached) / tokens, 4),
        "prefix_hits_ideal": round((end.ideal - begin.ideal) / tokens, 4),
        "reissued": end.reissues - begin.reissues,
        "resumed_by_clients": end.cut - begin.cut,
        "moved": end.moves - begin.moves,
        "pause_s": percentiles(pauses),
    }


def totals(fleet: Fleet) -> dict[str, int]:
    """Whether anything was lost: requests that came, ended whole and once, were given up, or are
    under way."""
    whole = [request for request in fleet.ended if request.committed == request.blocks]
    return {
        "requests": fleet.begun,
        "ended_whole": len(whole),
        "ended_not_once": sum(request.ends != 1 for request in fleet.ended),
        "given_up": len(fleet.failed),
        "under_way": len(fleet.open),
        "reissued": sum(router.reissues for router in fleet.routers),
        "resumed_by_clients": fleet.cut,
        "most_reissues_of_one": max(request.reissues for request in fleet.ended),
    }


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """p50, p99 and the largest; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    places = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    last = len(ordered) - 1
    return {name: round(ordered[int(share * last)], 3) for name, share in places.items()}


def middle(values: Sequence[float]) -> dict[str, float] | None:
    """The median and the largest of values at different times."""
    found = percentiles(values)
    return None if found is None else {"median": found["p50"], "worst": found["max"]}
