"""What decisions cost: wall time of the service's own classes, with so many pairs."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from benchmarks.fleet.agenda import Agenda
from benchmarks.fleet.choosers import ServiceChooser, run
from benchmarks.fleet.pairs import PairFigures, PrefixCounts, SimulatedPair
from twotower.deployments.pair.autoscaling import PairAutoscaling, PairScaling, PairSignals, Tick
from twotower.deployments.pair.tower_pair import Job
from twotower.deployments.routing.pairs import Pairs
from twotower.deployments.routing.policy import FAILURES, Room
from twotower.towers.request.params import GenerationParams

PROMPT_TOKENS = 2000
# Rows of the router on every pair, and pairs of a hundred that have just lost rows.
ROWS = 2
BROKEN = 0.02
_PARAMS = GenerationParams()


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """p50 and p99 of times, in milliseconds."""
    ordered = sorted(seconds)
    return {
        name: round(1e3 * ordered[int(share * (len(ordered) - 1))], 4)
        for name, share in (("p50_ms", 0.5), ("p99_ms", 0.99))
    }


class OneRouter:
    """A router over so many pairs, each with rows of its own, and a few that have lost some."""

    def __init__(self, pairs: int, seed: int) -> None:
        self._draw = random.Random(seed)
        agenda, counts = Agenda(), PrefixCounts(1)
        figures = PairFigures()
        replicas = [SimulatedPair(f"pair-{n}", figures, agenda, 0, counts) for n in range(pairs)]
        self.table = Pairs()
        self.chooser = ServiceChooser(self.table, None)
        for replica in replicas:
            replica.report()
        self.replicas = replicas
        self.chooser.update(replicas)
        for row in range(ROWS * pairs):
            self._put(f"row-{row}", replicas[row % pairs].name)
        for number in range(int(BROKEN * pairs)):
            for loss in range(FAILURES):
                self._put(f"lost-{number}-{loss}", replicas[number].name)
                self.table.lost(f"lost-{number}-{loss}")

    def pending(self, name: str) -> Any:
        """A call with a prompt of its own."""
        prompt = tuple(self._draw.choices(range(130_000), k=PROMPT_TOKENS))
        self.table.opened(name)
        return SimpleNamespace(args=[Job(name, prompt, (), _PARAMS)])

    def look(self, places: int, routers: int) -> Any:
        """A row that waits behind as many as a pair has places, and what it asks in each look."""
        for row in range(places + 1):
            self._put(f"waits-{row}", self.replicas[0].name)
        room = Room(places, max(1, places // routers))
        return lambda: self.table.moved("waits-0", "moved", room)

    def _put(self, row_id: str, pair: str) -> None:
        self.table.opened(row_id)
        self.table.routed(row_id, pair)


def decisions(pairs: int, times: int, seed: int = 0) -> dict[str, dict[str, float]]:
    """Times of a router's and the policy's decisions: choosing a pair, alone and with Serve's look
    at the queues, a look of a row that waits, the news of all pairs, and the number of pairs."""
    router = OneRouter(pairs, seed)
    choice: list[float] = []
    whole: list[float] = []
    for number in range(times):
        pending = router.pending(f"asked-{number}")
        begin = time.perf_counter()
        ranks = run(router.chooser.choose_replicas(router.chooser._replicas_list, pending))
        chosen = time.perf_counter()
        found = run(router.chooser._select_from_candidate_replicas(ranks[0], 0))
        whole.append(time.perf_counter() - begin)
        choice.append(chosen - begin)
        router.chooser.on_request_routed(pending, found.replica_id, None)
        router.table.ended(f"asked-{number}")
    few = max(10, times // 20)
    return {
        "choice": spread(choice),
        "choice_and_queues": spread(whole),
        "look": spread(_timed(router.look(places=1, routers=1), few)),
        "news": spread(_timed(lambda: router.chooser.update(router.replicas), few)),
        "policy": spread(_policy(pairs, few)),
    }


def _timed(call: Any, times: int) -> list[float]:
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return seconds


def _policy(pairs: int, times: int) -> list[float]:
    """A decision on the number of pairs that all report."""
    options = PairAutoscaling(max_pairs=2 * pairs, target_rows_per_pair=48.0, max_pass_s=0.5)
    scaling = PairScaling(options)
    seconds = []
    for number in range(times):
        now = 2.0 * number
        signals = [
            PairSignals(40.0 + pair % 20, pair % 3, 20.0, 0.02, 0.03, now, now)
            for pair in range(pairs)
        ]
        tick = Tick(now, pairs, signals, 50.0 * pairs, 0.0)
        begin = time.perf_counter()
        scaling.pairs_for(tick)
        seconds.append(time.perf_counter() - begin)
    return seconds
