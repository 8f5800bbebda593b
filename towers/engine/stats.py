"""Counters of an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

# Of several engines these have a mean, all others a sum.
_MEANS = ("pass_seconds", "clock_seconds", "busy_share")


@dataclass(frozen=True)
class EngineStats:
    """The present load of an engine, and its counters since the start; None where it has none.

    `rows` are open or wait for room, `queued_rows` of them wait for it; `pending_work` pieces of
    work wait for a pass. `passes` have run over `pass_rows` pieces of work of `pass_tokens` tokens,
    `prefill_tokens` among them, in `pass_seconds`. `clock_seconds` is the time of reading:
    between two readings, the difference of `pass_seconds` over that of `clock_seconds` is the busy
    share; `busy_share` is that since the first pass.

    Of an engine with a pool: its slots and pages, those in use, the bytes of those in use and of
    all. Of one with a prefix cache: its entries and their bytes, hits, misses, and tokens that hits
    saved. `mirrors` are rows that a denoiser tower's link follows. Of a context tower with links to
    denoisers: how many of these each transport carries, updates of states that they have taken, the
    bytes of these, and the seconds from the end of the pass that made each to its receipt.
    """

    rows: int
    queued_rows: int
    pending_work: int
    passes: int
    pass_rows: int
    pass_tokens: int
    prefill_tokens: int
    pass_seconds: float
    clock_seconds: float
    busy_share: float
    slots: int | None = None
    slots_used: int | None = None
    pages: int | None = None
    pages_used: int | None = None
    state_bytes: int | None = None
    pool_bytes: int | None = None
    cache_entries: int | None = None
    cache_bytes: int | None = None
    cache_hits: int | None = None
    cache_misses: int | None = None
    cache_cached_tokens: int | None = None
    mirrors: int | None = None
    grpc_links: int | None = None
    gloo_links: int | None = None
    nccl_links: int | None = None
    transfers: int | None = None
    transfer_bytes: int | None = None
    transfer_seconds: float | None = None

    @classmethod
    def merged(cls, engines: Sequence[EngineStats]) -> EngineStats:
        """Sums over at least one engine, and means of times and shares; None where any is None."""
        values: dict[str, Any] = {}
        for field in fields(cls):
            each = [getattr(stats, field.name) for stats in engines]
            if None in each:
                values[field.name] = None
            elif field.name in _MEANS:
                values[field.name] = sum(each) / len(each)
            else:
                values[field.name] = sum(each)
        return cls(**values)

    def report(self) -> dict[str, float]:
        """The counters that are not None, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def busy_share_since(self, before: EngineStats) -> float:
        """Share of the time since another reading of the same engine that it spent in passes."""
        elapsed = self.clock_seconds - before.clock_seconds
        return (self.pass_seconds - before.pass_seconds) / elapsed if elapsed > 0 else 0.0
