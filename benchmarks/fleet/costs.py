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


class Stopwatch:
    """Times of calls, by the wall and by the thread's CPU: on a busy machine the wall's last
    percent is that of other work."""

    def __init__(self) -> None:
        self._wall: list[float] = []
        self._cpu: list[float] = []

    def __enter__(self) -> None:
        self._began = time.perf_counter(), time.thread_time()

    def __exit__(self, *_: object) -> None:
        cpu, wall = time.thread_time(), time.perf_counter()
        self._wall.append(wall - self._began[0])
        self._cpu.append(cpu - self._began[1])

    def figures(self) -> dict[str, dict[str, float]]:
        """p50 and p99 in milliseconds."""
        return {"wall_ms": _spread(self._wall), "cpu_ms": _spread(self._cpu)}


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return {
        name: round(1e3 * ordered[int(share * last)], 4)
        for name, share in (("p50", 0.5), ("p99", 0.99))
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


def decisions(pairs: int, times: int, seed: int = 0) -> dict[str, Any]:
    """Times of a router's and the policy's decisions: choosing a pair, Serve's look at the queues
    of those that were chosen, a look of a row that waits, the news of all pairs, and the number of
    pairs."""
    router = OneRouter(pairs, seed)
    choice, queues = Stopwatch(), Stopwatch()
    for number in range(times):
        pending = router.pending(f"asked-{number}")
        with choice:
            ranks = run(router.chooser.choose_replicas(router.chooser._replicas_list, pending))
        with queues:
            found = run(router.chooser._select_from_candidate_replicas(ranks[-1], 0))
        router.chooser.on_request_routed(pending, found.replica_id, None)
        router.table.ended(f"asked-{number}")
    few = max(10, times // 5)
    return {
        "choice": choice.figures(),
        "queues": queues.figures(),
        "look": _timed(router.look(places=1, routers=1), few),
        "news": _timed(lambda: router.chooser.update(router.replicas), few),
        "policy": _policy(pairs, few),
    }


def _timed(call: Any, times: int) -> dict[str, dict[str, float]]:
    watch = Stopwatch()
    for _ in range(times):
        with watch:
            call()
    return watch.figures()


def _policy(pairs: int, times: int) -> dict[str, dict[str, float]]:
    """A decision on the number of pairs that all report."""
    options = PairAutoscaling(max_pairs=2 * pairs, target_rows_per_pair=48.0, max_pass_s=0.5)
    scaling, watch = PairScaling(options), Stopwatch()
    for number in range(times):
        now = 2.0 * number
        signals = [
            PairSignals(40.0 + pair % 20, pair % 3, 20.0, 0.02, 0.03, now, now)
            for pair in range(pairs)
        ]
        tick = Tick(now, pairs, signals, 50.0 * pairs, 0.0)
        with watch:
            scaling.pairs_for(tick)
    return watch.figures()
