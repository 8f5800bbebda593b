"""Replays a load against scaling policies, with thousands of pairs and no cluster.

    python -m benchmarks.autoscale_sim square --low 20 --high 200 --period 600 --max-pairs 40
    python -m benchmarks.autoscale_sim requests.jsonl --hours 2

The load is one of square, ramp, diurnal, burst and poisson (requests/s between --low and --high,
drawn around the rate) or a file with a JSON object per line, {"at": seconds, "tokens": count}.
Requests go to the pair with the fewest, as the router sends them, and wait there in order; with no
pair up they wait in the router. A row's block takes `--block-s` and `--row-block-s` more for each
row of its pair; the defaults are the weight-read roofline of an H100 per tower at 7.9 steps a
block. A pair works `--start-s` after it is asked for, and ends its rows before it goes.

Everything happens on a grid of `--step-s`: waits are exact to one step. Prints one JSON object:
per policy the waits, what was refused, pair-hours and changes. Compared are the service's policy,
the same target without smoothing, window and margin, and fixed numbers: as many pairs as ours has
on average, and at most.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twotower.deployments.pair.autoscaling import PairAutoscaling, PairScaling, PairSignals, Tick

Floats = NDArray[np.float64]
BLOCK_TOKENS = 16
ABSENT, STARTING, RUNNING, DRAINING = range(4)
# Opposite changes within this time count as a flap.
FLAP_S = 600.0
# The number of pairs wanted from now on.
Policy = Callable[[Tick], int]


@dataclass(frozen=True)
class Figures:
    """Capacity of a pair and its times in seconds. Rows beyond `queue` are refused."""

    slots: int = 64
    queue: int = 256
    block_s: float = 0.151
    row_block_s: float = 0.00027
    start_s: float = 90.0
    cold_start_queue: int = 1024
    cold_start_timeout_s: float = 300.0


@dataclass(frozen=True)
class Load:
    """Requests/s as a function of the time in seconds, and their mean number of tokens; or all
    requests as pairs of time and tokens."""

    rate: Callable[[float], float]
    mean_tokens: float = 256.0
    requests: tuple[tuple[float, float], ...] | None = None

    def steps(self, seconds: float, step_s: float, seed: int) -> Iterator[Floats]:
        """For each step, the blocks of each request that arrives in it."""
        count = math.ceil(seconds / step_s)
        if self.requests is None:
            random = np.random.default_rng(seed)
            for step in range(count):
                arrivals = random.poisson(self.rate(step * step_s) * step_s)
                tokens = random.exponential(self.mean_tokens, arrivals)
                yield np.maximum(1.0, np.ceil(tokens / BLOCK_TOKENS))
            return
        given = np.asarray(sorted(self.requests), dtype=np.float64).reshape(-1, 2)
        borders = np.searchsorted(given[:, 0], np.arange(count + 1) * step_s)
        for first, last in pairwise(borders):
            yield np.maximum(1.0, np.ceil(given[first:last, 1] / BLOCK_TOKENS))


def load_from(args: argparse.Namespace) -> Load:
    """The load that the command line names. Raises ValueError for a line that is not a request."""
    seconds = args.hours * 3600
    low, high, period = args.low, args.high, args.period or seconds
    rates: dict[str, Callable[[float], float]] = {
        "square": lambda at: high if at % period < period / 2 else low,
        "ramp": lambda at: low + (high - low) * at / seconds,
        "diurnal": lambda at: low + (high - low) * (1 - math.cos(2 * math.pi * at / period)) / 2,
        "burst": lambda at: high if abs(at - seconds / 2) < args.burst_s / 2 else low,
        "poisson": lambda _: high,
    }
    if args.load in rates:
        return Load(rates[args.load], args.tokens)
    return Load(lambda _: 0.0, requests=tuple(read_requests(Path(args.load))))


class Fleet:
    """Pairs, their rows and queues, as arrays over the pairs."""

    def __init__(self, figures: Figures, pairs: int, most: int) -> None:
        self.figures = figures
        self.refused = 0
        # Counts of rows by steps that they waited, and of requests by steps that they took.
        self.waits: NDArray[np.int64] = np.zeros(1, np.int64)
        self.spans: NDArray[np.int64] = np.zeros(1, np.int64)
        self.state = np.zeros(most, np.int8)
        self.state[:pairs] = RUNNING
        self.rows: NDArray[np.int64] = np.zeros(most, np.int64)
        self.waiting: NDArray[np.int64] = np.zeros(most, np.int64)
        self._ready_at = np.zeros(most)
        self._left = np.zeros((most, figures.slots))
        self._came = np.zeros((most, figures.slots), np.int64)
        self._queue_head = np.zeros(most, np.int64)
        self._queue_blocks = np.zeros((most, figures.queue))
        self._queue_came = np.zeros((most, figures.queue), np.int64)
        # At the router: the step of arrival and the blocks of each request.
        self._router: list[tuple[int, float]] = []

    @property
    def wanted(self) -> int:
        """Pairs that run or start."""
        return int(np.count_nonzero((self.state == RUNNING) | (self.state == STARTING)))

    @property
    def held(self) -> int:
        """Pairs that hold machines."""
        return int(np.count_nonzero(self.state))

    def tick(self, at: float) -> Tick:
        """The report of pairs and router."""
        up = self.state == RUNNING
        rows, waiting = self.rows[up].tolist(), self.waiting[up].tolist()
        signals = [
            PairSignals(row, wait, self.figures.slots - row, read_at=at)
            for row, wait in zip(rows, waiting, strict=True)
        ]
        queued = len(self._router)
        return Tick(at, self.wanted, signals, sum(rows) + sum(waiting) + queued, queued)

    def scale(self, pairs: int, at: float) -> None:
        """Starts pairs, or ends some: first those that are still starting, then the last ones."""
        change = pairs - self.wanted
        if change > 0:
            new = np.flatnonzero(self.state == ABSENT)[:change]
            self.state[new] = STARTING
            self._ready_at[new] = at + self.figures.start_s
            return
        order = [*np.flatnonzero(self.state == STARTING)[::-1]]
        order += [*np.flatnonzero(self.state == RUNNING)[::-1]]
        for pair in order[:-change] if change else []:
            self.state[pair] = DRAINING if self.state[pair] == RUNNING else ABSENT

    def step(self, step: int, step_s: float, arrivals: Floats) -> None:
        """Advances the time to `step`; the requests `arrivals` (their blocks) have come since."""
        figures = self.figures
        self.state[(self.state == STARTING) & (self._ready_at <= step * step_s)] = RUNNING
        per_block = figures.block_s + figures.row_block_s * self.rows
        busy = self._left > 0
        self._left -= (step_s / per_block)[:, None]
        ended = busy & (self._left <= 0)
        self.spans = _counted(self.spans, step - self._came[ended])
        np.maximum(self._left, 0, out=self._left)
        self.rows -= ended.sum(axis=1)
        came = np.full(len(arrivals), step)
        if not (self.state == RUNNING).any():
            self._hold(came, arrivals, step, step_s)
        else:
            if self._router:
                held = np.asarray(self._router)
                came = np.concatenate([held[:, 0].astype(np.int64), came])
                arrivals = np.concatenate([held[:, 1], arrivals])
                self._router = []
            self._send(came, arrivals)
        self._start_rows(step)
        self.state[(self.state == DRAINING) & (self.rows + self.waiting == 0)] = ABSENT

    def _hold(self, came: NDArray[np.int64], blocks: Floats, step: int, step_s: float) -> None:
        """Keeps requests at the router, within its limits of number and time."""
        oldest = step - self.figures.cold_start_timeout_s / step_s
        kept = [entry for entry in self._router if entry[0] >= oldest]
        kept += zip(came.tolist(), blocks.tolist(), strict=True)
        before = len(self._router) + len(blocks)
        self._router = kept[: self.figures.cold_start_queue]
        self.refused += before - len(self._router)

    def _send(self, came: NDArray[np.int64], blocks: Floats) -> None:
        """Appends requests to the queues of the least loaded pairs."""
        up = np.flatnonzero(self.state == RUNNING)
        room = self.figures.slots + self.figures.queue
        given = spread(self.rows[up] + self.waiting[up], len(blocks), room)
        # Until rows start, all requests of a pair are in its queue.
        given = np.minimum(given, self.figures.queue - self.waiting[up])
        taken = int(given.sum())
        self.refused += len(blocks) - taken
        pair, place = _places(up, given)
        slot = (self._queue_head[pair] + self.waiting[pair] + place) % self.figures.queue
        self._queue_blocks[pair, slot] = blocks[:taken]
        self._queue_came[pair, slot] = came[:taken]
        self.waiting[up] += given

    def _start_rows(self, step: int) -> None:
        """Moves rows from the queues into free slots."""
        starts = np.minimum(self.waiting, self.figures.slots - self.rows)
        pairs = np.flatnonzero(starts)
        pair, place = _places(pairs, starts[pairs])
        queued = (self._queue_head[pair] + place) % self.figures.queue
        free_pair, free_slot = np.nonzero(self._left[pairs] <= 0)
        first = np.searchsorted(free_pair, np.arange(len(pairs)))
        slot = free_slot[np.repeat(first, starts[pairs]) + place]
        came = self._queue_came[pair, queued]
        self._left[pair, slot] = self._queue_blocks[pair, queued]
        self._came[pair, slot] = came
        self.waits = _counted(self.waits, step - came)
        self.rows += starts
        self.waiting -= starts
        self._queue_head = (self._queue_head + starts) % self.figures.queue


def spread(loads: NDArray[np.int64], count: int, most: int) -> NDArray[np.int64]:
    """The number of `count` requests that each pair gets: the least loaded first, at most up to a
    load of `most`."""
    order = np.argsort(loads, kind="stable")
    ordered = loads[order]
    # Requests that raise all loads before the k-th to the k-th.
    cost = ordered * np.arange(len(loads)) - (np.cumsum(ordered) - ordered)
    lifted = int(np.searchsorted(cost, count, side="right"))
    level, rest = divmod(count + int(ordered[:lifted].sum()), lifted)
    given = np.zeros_like(loads)
    given[order[:lifted]] = level - ordered[:lifted]
    given[order[:rest]] += 1
    return np.minimum(given, np.maximum(0, most - loads))


def fixed(pairs: int) -> Policy:
    """A policy that always asks for the same number of pairs."""
    return lambda _: pairs


def target_only(options: PairAutoscaling) -> Policy:
    """A policy that asks for all requests over the target of a pair, rounded up, at every tick."""

    def pairs_for(tick: Tick) -> int:
        wanted = math.ceil(tick.requests / options.target_rows_per_pair)
        return min(options.max_pairs, max(options.min_pairs, wanted))

    return pairs_for


def replay(
    load: Load,
    policy: Policy,
    figures: Figures,
    options: PairAutoscaling,
    *,
    seconds: float,
    step_s: float = 0.25,
    seed: int = 0,
    first_pairs: int | None = None,
) -> dict[str, Any]:
    """Figures of a policy under a load; reports of pairs and router reach the policy one metrics
    interval later."""
    pairs = max(1, options.min_pairs) if first_pairs is None else first_pairs
    most = max(options.max_pairs, pairs)
    # Pairs that drain still hold machines while others start.
    fleet = Fleet(figures, pairs, 2 * most)
    every = max(1, round(options.metrics_interval_s / step_s))
    heard = fleet.tick(0.0)
    held, peak, changes = 0, pairs, []
    for step, arrivals in enumerate(load.steps(seconds, step_s, seed), start=1):
        fleet.step(step, step_s, arrivals)
        held += fleet.held
        if step % every == 0:
            now = step * step_s
            wanted = policy(heard._replace(time=now, pairs=fleet.wanted))
            if wanted != fleet.wanted:
                changes.append((now, wanted - fleet.wanted))
                fleet.scale(wanted, now)
            peak = max(peak, wanted)
            heard = fleet.tick(now)
    return {
        "requests": int(fleet.waits.sum() + fleet.refused),
        "wait_s": _percentiles(fleet.waits, step_s),
        "request_s": _percentiles(fleet.spans, step_s),
        "refused": fleet.refused,
        "pair_hours": round(held * step_s / 3600, 3),
        "most_pairs": peak,
        **_turns(changes),
    }


def _turns(changes: Sequence[tuple[float, int]]) -> dict[str, int]:
    """Counts of changes, given as times and numbers of pairs more or less."""
    ups = sum(change > 0 for _, change in changes)
    return {"ups": ups, "downs": len(changes) - ups, "flaps": flaps(changes)}


def flaps(changes: Sequence[tuple[float, int]]) -> int:
    """Changes that follow an opposite one within FLAP_S."""
    return sum(
        (before > 0) != (after > 0) and at - earlier <= FLAP_S
        for (earlier, before), (at, after) in pairwise(changes)
    )


def compare(
    load: Load, figures: Figures, options: PairAutoscaling, **run: Any
) -> dict[str, dict[str, Any]]:
    """Figures of the service's policy and of simple policies."""
    ours = replay(load, PairScaling(options).pairs_for, figures, options, **run)
    results = {
        "ours": ours,
        "target_only": replay(load, target_only(options), figures, options, **run),
    }
    average = max(1, round(3600 * ours["pair_hours"] / run["seconds"]))
    for name, pairs in (("fixed_average", average), ("fixed_most", ours["most_pairs"])):
        results[name] = replay(load, fixed(pairs), figures, options, first_pairs=pairs, **run)
    return results


def main() -> None:
    """Parses the arguments, replays, prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("load", help="square, ramp, diurnal, burst, poisson or a JSONL file")
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--low", type=float, default=20.0, help="requests/s")
    parser.add_argument("--high", type=float, default=200.0, help="requests/s")
    parser.add_argument("--period", type=float, help="seconds; the whole time if left out")
    parser.add_argument("--burst-s", type=float, default=120.0)
    parser.add_argument("--tokens", type=float, default=256.0, help="mean of a request")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step-s", type=float, default=0.25)
    for name, default in vars(Figures()).items():
        parser.add_argument(_option(name), type=type(default), default=default)
    given = PairAutoscaling(max_pairs=40, target_rows_per_pair=48.0).model_dump()
    # The simulator's router keeps whatever comes.
    del given["cold_start_queue"]
    for name, default in given.items():
        kind = float if default is None else type(default)
        parser.add_argument(_option(name), type=kind, default=default)
    args = parser.parse_args()
    figures = Figures(**{name: getattr(args, name) for name in vars(Figures())})
    options = PairAutoscaling(**{name: getattr(args, name) for name in given})
    started = time.perf_counter()
    run = {"seconds": args.hours * 3600, "step_s": args.step_s, "seed": args.seed}
    policies = compare(load_from(args), figures, options, **run)
    elapsed = round(time.perf_counter() - started, 1)
    asked = {"load": args.load, "low": args.low, "high": args.high, "period": args.period, **run}
    shown = {**asked, "figures": vars(figures), "options": options.model_dump()}
    print(json.dumps({**shown, "elapsed_s": elapsed, "policies": policies}, indent=2))


def read_requests(path: Path) -> Iterator[tuple[float, float]]:
    """Times and tokens of the requests in a file. Raises ValueError naming a line that is not a
    request."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
            at, tokens = float(entry["at"]), float(entry["tokens"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}:{number}: {error!r}, expected at and tokens") from None
        if not (0 <= at < math.inf and 0 < tokens < math.inf):
            raise ValueError(f"{path}:{number}: at {at}, tokens {tokens}, expected both from 0 up")
        yield at, tokens


def _places(pairs: NDArray[np.int64], counts: NDArray[np.int64]) -> tuple[Any, Any]:
    """Each pair repeated as often as its count, and the numbers 0, 1, ... within each."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(pairs, counts), np.arange(total) - np.repeat(ends - counts, counts)


def _counted(counts: NDArray[np.int64], values: NDArray[np.int64]) -> NDArray[np.int64]:
    new = np.bincount(values, minlength=len(counts))
    new[: len(counts)] += counts
    return new


def _percentiles(counts: NDArray[np.int64], step_s: float) -> dict[str, float] | None:
    """p50 and p99 of values in steps, in seconds."""
    ends = np.cumsum(counts)
    if not ends[-1]:
        return None
    found = np.searchsorted(ends, [0.5 * ends[-1], 0.99 * ends[-1]])
    return {
        name: round(float(k * step_s), 3) for name, k in zip(("p50", "p99"), found, strict=True)
    }


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


if __name__ == "__main__":
    main()
