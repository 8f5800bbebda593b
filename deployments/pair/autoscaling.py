"""The number of pairs of towers: settings, the policy over signals, and its adapter for Ray Serve.

    demand = rows anywhere / rows that a pair should have, smoothed               [pairs]
    least  = demand, rounded up
    most   = highest demand of the last `scale_down_after_s` / (1 - hysteresis), rounded up
    pairs  = the present number, moved into least..most and into the bounds

So pairs come as soon as the smoothed demand asks for them, and go once no demand of a whole window
has asked for them, with a margin: a load that changes faster than the window moves nothing after
its first peak. Each line is monotone in the load and in the present number: more load never gives
fewer pairs. How busy a tower is says little (one row keeps it as busy as forty); what grows with
the load are rows, rows that wait, and the time of a pass.

Serve pickles this module by value into its controller: it imports the standard library and
pydantic, which Serve needs too.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

UNKNOWN = math.nan
# Share of the rows that fit into a pair's memory: the next rows find room while a pair starts.
MEMORY_FILL = 0.75
# Of the rows that a pair may have; the rest is for those that come while another pair starts.
TARGET_FILL = 0.75
# Processes have a place in Serve's tables.
MOST_PAIRS = 2**14
# Not worth a pair: what smoothing leaves of a load that has ended, and rounding.
_REMAINDER = 0.01
# Serve averages requests over this many intervals, which have to be more than one.
_LOOK_BACK = 3


class PairAutoscaling(BaseModel):
    """Number of pairs by load, in place of `num_pairs`; times in seconds.

    A pair should have `target_rows_per_pair` rows, or fewer where fewer fit or where a pass of
    either tower takes longer than `max_pass_s`. The demand is smoothed over `smoothing_s`. Pairs go
    when they were not needed for `scale_down_after_s`, counted with `hysteresis` of room to spare.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    min_pairs: int = Field(
        1, ge=0, le=MOST_PAIRS, description="0 = none after zero_after_s without a request"
    )
    max_pairs: int = Field(
        ge=1, le=MOST_PAIRS, description="most pairs; the cluster must have room for them"
    )
    target_rows_per_pair: float | None = Field(
        None, ge=1, description="rows that a pair should have; none = 3/4 of max_num_seqs"
    )
    max_pass_s: float | None = Field(
        None, gt=0, description="a pair whose passes take longer should have fewer rows"
    )
    smoothing_s: float = Field(10.0, ge=0, description="time over which the load is smoothed")
    scale_down_after_s: float = Field(
        300.0, ge=0, description="pairs go when they were not needed for so long"
    )
    hysteresis: float = Field(0.2, ge=0, lt=1, description="share of spare room before pairs go")
    zero_after_s: float = Field(600.0, ge=0, description="calm before the last pair goes")
    metrics_interval_s: float = Field(
        2.0, ge=0.5, description="how often pairs report; below 2 only for few pairs"
    )
    cold_start_queue: int | None = Field(
        None,
        ge=1,
        le=2**31 - 1,
        description="requests that wait in the router for a pair; more are refused; "
        "none = as many as max_pairs pairs take",
    )

    @model_validator(mode="after")
    def _check_bounds(self) -> PairAutoscaling:
        if self.max_pairs < self.min_pairs:
            raise ValueError(f"max_pairs: got {self.max_pairs}, expected at least {self.min_pairs}")
        return self

    @property
    def stale_after_s(self) -> float:
        """Age from which on a pair's signals are those of a pair that does not answer."""
        return max(30.0, 5 * self.metrics_interval_s)

    def for_rows(self, max_num_seqs: int) -> PairAutoscaling:
        """The same with a target for pairs of that many rows, if none is set."""
        target = self.target_rows_per_pair or max(1.0, TARGET_FILL * max_num_seqs)
        return self.model_copy(update={"target_rows_per_pair": target})


class PairSignals(NamedTuple):
    """The load of a pair, NaN where it is not known; Serve carries it under the same names.

    Rows in its towers, rows that wait for room, further rows of their size that would fit, mean
    seconds of a pass of each tower, passes of the context tower so far (a row that comes and goes
    between two readings shows in them), and the time of reading.
    """

    rows: float = UNKNOWN
    queued_rows: float = UNKNOWN
    free_slots: float = UNKNOWN
    context_pass_s: float = UNKNOWN
    denoiser_pass_s: float = UNKNOWN
    passes: float = UNKNOWN
    read_at: float = UNKNOWN


class Tick(NamedTuple):
    """All that a decision sees: the time, the number of pairs wanted so far, one entry per running
    pair, and the router's requests: all of them, and those that no pair has yet."""

    time: float
    pairs: int
    signals: Sequence[PairSignals]
    requests: float = UNKNOWN
    queued: float = UNKNOWN


class _Load(NamedTuple):
    """Rows anywhere, rows that a pair should have, whether there can be no more rows than these,
    and whether nothing was asked for since the last tick."""

    rows: float
    room: float
    whole: bool
    calm: bool


class PairScaling:
    """The policy. It has no clock and draws nothing: the same ticks give the same decisions."""

    def __init__(self, options: PairAutoscaling) -> None:
        if options.target_rows_per_pair is None:
            raise ValueError("target_rows_per_pair: got none, expected a number of rows")
        self._options = options
        self._target_rows = options.target_rows_per_pair
        self._demand = UNKNOWN
        self._time = UNKNOWN
        self._passes = 0.0
        self._asked_at = UNKNOWN
        # Times and demands of the window, without those that a later one exceeds.
        self._peaks: deque[tuple[float, float]] = deque()

    def pairs_for(self, tick: Tick) -> int:
        """The number of pairs wanted from now on; without any signal the present number."""
        options = self._options
        load = self._load(tick)
        # What the present pairs are good for, so that an unknown time does not look like a calm.
        held = tick.pairs * (1 - options.hysteresis)
        first = math.isnan(self._time)
        if first:
            self._demand, self._time = held, tick.time
        if load is not None:
            self._smooth(load.rows / load.room, tick.time)
        self._time = tick.time
        surely = load is not None and load.whole and not first
        self._remember(tick.time, self._demand if surely else max(self._demand, held))
        if first or load is None or not load.calm:
            self._asked_at = tick.time
        if load is None:
            return self._bounded(tick.pairs, at_least=min(1, tick.pairs))
        if load.calm and tick.time - self._asked_at >= options.zero_after_s:
            return self._bounded(0, at_least=0)
        most = _pairs(self._peaks[0][1] / (1 - options.hysteresis))
        pairs = max(_pairs(self._demand), min(tick.pairs, most))
        return self._bounded(pairs, at_least=1 if tick.pairs or load.rows > 0 else 0)

    def _load(self, tick: Tick) -> _Load | None:
        """The load as far as it is known; None if nothing is."""
        oldest = tick.time - self._options.stale_after_s
        fresh = [
            pair
            for pair in tick.signals
            if pair.read_at >= oldest and _is_count(pair.rows) and _is_count(pair.queued_rows)
        ]
        requests, queued = _is_count(tick.requests), _is_count(tick.queued)
        if not (fresh or requests or queued):
            return None
        at_pairs = sum(pair.rows + pair.queued_rows for pair in fresh)
        # The router knows of rows in pairs that do not report, pairs of rows whose router is gone.
        rows = max(tick.requests if requests else 0, at_pairs + (tick.queued if queued else 0))
        exact = queued and len(fresh) == len(tick.signals)
        # Questions after a pair's health are requests as well, but no rows.
        calm = (at_pairs + tick.queued if exact else rows) == 0 and not self._passed(fresh)
        return _Load(rows, self._room(fresh), exact or requests, calm)

    def _passed(self, fresh: Sequence[PairSignals]) -> bool:
        """True if towers have worked since the last call."""
        before, self._passes = self._passes, sum(p.passes for p in fresh if _is_count(p.passes))
        return self._passes != before

    def _room(self, fresh: Sequence[PairSignals]) -> float:
        """Rows that a pair should have, by the mean of the pairs that work."""
        rooms = [self._pair_room(pair) for pair in fresh if pair.rows >= 1]
        return max(1.0, sum(rooms) / len(rooms) if rooms else self._target_rows)

    def _pair_room(self, pair: PairSignals) -> float:
        options = self._options
        room = self._target_rows
        if _is_count(pair.free_slots):
            room = min(room, MEMORY_FILL * (pair.rows + pair.free_slots))
        if options.max_pass_s is not None:
            for pass_s in (pair.context_pass_s, pair.denoiser_pass_s):
                if pass_s > 0:
                    room = min(room, pair.rows * options.max_pass_s / pass_s)
        return room

    def _smooth(self, demand: float, time: float) -> None:
        """Exponential smoothing, exact for ticks of any distance."""
        smoothing, elapsed = self._options.smoothing_s, max(0.0, time - self._time)
        kept = math.exp(-elapsed / smoothing) if smoothing > 0 else 0.0
        self._demand = demand + kept * (self._demand - demand)

    def _remember(self, time: float, demand: float) -> None:
        peaks = self._peaks
        while peaks and peaks[-1][1] <= demand:
            peaks.pop()
        peaks.append((time, demand))
        while peaks[0][0] < time - self._options.scale_down_after_s:
            peaks.popleft()

    def _bounded(self, pairs: int, at_least: int) -> int:
        options = self._options
        return min(options.max_pairs, max(options.min_pairs, at_least, pairs))


class ServePairScaling:
    """PairScaling as `policy_function` of a Serve deployment; keywords are PairAutoscaling fields.

    Serve asks ten times a second; a decision is made once per metrics interval. With no pair
    running Serve does not ask at all: it starts one for the first request by itself.
    """

    def __init__(self, **options: Any) -> None:
        self._options = PairAutoscaling(**options)
        self._scaling = PairScaling(self._options)
        self._decided_at = UNKNOWN

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The number of pairs for a `ray.serve.config.AutoscalingContext`; no state of Serve's."""
        now: float = context.current_time
        if 0 <= now - self._decided_at < self._options.metrics_interval_s:
            return context.target_num_replicas, {}
        self._decided_at = now
        raw = context.raw_metrics or {}
        tick = Tick(
            time=now,
            pairs=context.target_num_replicas,
            signals=[_last_signals(raw, replica) for replica in context.running_replicas],
            requests=context.total_num_requests,
            queued=context.total_queued_requests,
        )
        return self._scaling.pairs_for(tick), {}


def serve_settings(options: PairAutoscaling) -> dict[str, Any]:
    """`autoscaling_config` of a deployment of pairs: the policy smooths, Serve does not.

    The first pair starts with the service even if `min_pairs` is 0, so that a service which has
    come up has shown that its towers load.
    """
    return {
        "min_replicas": options.min_pairs,
        "initial_replicas": max(1, options.min_pairs),
        "max_replicas": options.max_pairs,
        "upscale_delay_s": 0,
        "downscale_delay_s": 0,
        "metrics_interval_s": options.metrics_interval_s,
        "look_back_period_s": _LOOK_BACK * options.metrics_interval_s,
        "policy": {
            "policy_function": f"{__name__}:{ServePairScaling.__name__}",
            "policy_kwargs": options.model_dump(),
        },
    }


def _last_signals(raw: Mapping[str, Mapping[Any, Sequence[Any]]], replica: Any) -> PairSignals:
    """The newest point of each series that Serve keeps of a replica."""
    last = {
        name: series[-1]
        for name in PairSignals._fields
        if (series := raw.get(name, {}).get(replica))
    }
    if "rows" not in last:
        return PairSignals()
    values = {name: float(point.value) for name, point in last.items()}
    return PairSignals(**values, read_at=float(last["rows"].timestamp))


def _is_count(value: float) -> bool:
    return math.isfinite(value) and value >= 0


def _pairs(demand: float) -> int:
    return max(0, math.ceil(demand - _REMAINDER))
