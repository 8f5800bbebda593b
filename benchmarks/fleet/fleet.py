"""All of a fleet in simulated time: clients, routers, pairs, Serve's messages, and the number of
pairs."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

from benchmarks.fleet.agenda import Agenda
from benchmarks.fleet.choosers import ServiceChooser
from benchmarks.fleet.load import Clients, Request, Traffic
from benchmarks.fleet.pairs import PairFigures, PrefixCounts, SimulatedPair
from benchmarks.fleet.routers import SimulatedRouter
from twotower.deployments.app import REPORT_S
from twotower.deployments.pair.autoscaling import PairAutoscaling, PairScaling, Tick
from twotower.deployments.routing.pairs import Pairs
from twotower.deployments.routing.policy import Room
from twotower.towers.errors import TwoTowerError

# From a change of the pairs to the routers' hearing of it, at most.
BROADCAST_S = 0.2
# A client's pause before it resumes a request whose router has gone, at most.
RESUME_S = 2.0
RAMP_S = 20.0
# Chats that rest between two turns, of those that are served.
RESTING = 0.25


@dataclass(frozen=True)
class Size:
    """Pairs in `zones`, routers, and requests at a time; without `affinity` no prompt belongs to a
    pair."""

    pairs: int
    routers: int
    requests: int
    zones: int = 3
    affinity: bool = True
    figures: PairFigures = field(default_factory=PairFigures)
    traffic: Traffic = field(default_factory=Traffic)


class Sample(NamedTuple):
    """The rows of the pairs that take requests at a time, and those that wait in all pairs."""

    at: float
    mean: float
    most: int
    p99: int
    median: int
    queued: int


class Fleet:
    """The fleet; its figures are read from what it counts."""

    def __init__(self, size: Size, seed: int) -> None:
        self.size, self.agenda = size, Agenda()
        self.draw = random.Random(seed)
        # What the service itself draws: which pairs are looked at, and pauses.
        random.seed(seed)
        self.pairs: list[SimulatedPair] = []
        self.ended: list[Request] = []
        self.failed: list[tuple[Request, TwoTowerError]] = []
        self.begun = self.cut = 0
        self.open: dict[Request, None] = {}
        self.closed = False
        self.wanted = size.pairs
        self.samples: list[Sample] = []
        self.prefixes = PrefixCounts(size.pairs * size.figures.cache_entries)
        self._names = count()
        self._draining: set[SimulatedPair] = set()
        self._clients = Clients(size.traffic, self.draw)
        self.routers = [self._router(number) for number in range(size.routers)]
        rows = size.requests / size.pairs
        self._scaling = PairScaling(
            PairAutoscaling(
                min_pairs=size.pairs // 2, max_pairs=size.pairs, target_rows_per_pair=max(1.0, rows)
            )
        )
        for number in range(size.pairs):
            self.start_pair(number % size.zones)
        self._begin()

    def _router(self, number: int) -> SimulatedRouter:
        table = Pairs(self.agenda.clock)
        room = Room.of(self.size.figures.slots, self.size.routers)
        chooser = ServiceChooser(table, self.agenda.clock)
        chooser.initialize_state(num_routers=self.size.routers)
        told = (self._done, self._failed, self._cut, self._prompt)
        return SimulatedRouter(number, self.agenda, table, chooser, room, *told)

    def _prompt(self, request: Request) -> tuple[int, ...]:
        return self._clients.prompt(request) if self.size.affinity else ()

    def _begin(self) -> None:
        """Clients come over RAMP_S; then each request that ends makes room for another."""
        self._clients.fill(round(RESTING * self.size.requests))
        for _ in range(self.size.requests):
            self.agenda.at(self.draw.random() * RAMP_S, self._next)
        self.agenda.every(REPORT_S, self._report)
        self.agenda.every(REPORT_S, self._decide, first=REPORT_S / 2)

    def present(self) -> list[SimulatedPair]:
        """Pairs that Serve has for new attempts: those that it does not know to be gone."""
        return [pair for pair in self.pairs if pair not in self._draining]

    def start_pair(self, zone: int) -> None:
        """A pair is up."""
        pair = SimulatedPair(
            f"pair-{next(self._names)}", self.size.figures, self.agenda, zone, self.prefixes
        )
        pair.report()
        self.pairs.append(pair)

    def end_pair(self, pair: SimulatedPair) -> None:
        """A pair has gone, and its rows hear of it."""
        self.pairs.remove(pair)
        self._draining.discard(pair)
        pair.end()

    def lose_zone(self, zone: int, notice_s: float, back_s: float) -> int:
        """All pairs of a zone fall silent; Ray notices after a time, and later they are back as new
        ones. Returns the rows that they had."""
        lost = [pair for pair in self.pairs if pair.zone == zone]
        rows = sum(pair.rows for pair in lost)
        for pair in lost:
            pair.stop()
        self.agenda.after(notice_s, lambda: self._gone(lost, back_s))
        return rows

    def lose_pair(self, back_s: float) -> int:
        """The process of a pair dies; Serve starts another. Returns the rows that it had."""
        pair = self.draw.choice(self.present())
        rows = pair.rows
        self._gone([pair], back_s)
        return rows

    def lose_router(self) -> int:
        """The process of a router dies; its clients go on at others. Returns its requests."""
        router = next(router for router in self.routers if router.up)
        requests = len(router.attempts)
        router.die()
        return requests

    def _gone(self, lost: Sequence[SimulatedPair], back_s: float) -> None:
        for pair in lost:
            self.end_pair(pair)
            self.agenda.after(back_s, self._starting(pair.zone))
        self.broadcast()
        self.agenda.after(back_s, self.broadcast)

    def _starting(self, zone: int) -> Callable[[], None]:
        return lambda: self.start_pair(zone)

    def drain(self, pairs: Sequence[SimulatedPair], timeout_s: float, again_s: float) -> None:
        """Pairs take no new attempts, end when they are empty or after a time, and come back as
        new ones."""
        self._draining.update(pairs)
        self.broadcast()
        for pair in pairs:
            self._until_empty(pair, self.agenda.now + timeout_s, again_s)

    def broadcast(self) -> None:
        """Serve tells every router which pairs there are, and what they last said."""
        for router in self.routers:
            delay = BROADCAST_S * (router.number + 1) / len(self.routers)
            self.agenda.after(delay, self._telling(router))

    def _telling(self, router: SimulatedRouter) -> Callable[[], None]:
        return lambda: router.chooser.update(self.present()) if router.up else None

    def _until_empty(self, pair: SimulatedPair, deadline: float, again_s: float) -> None:
        if pair not in self._draining:
            return
        if pair.rows and self.agenda.now < deadline:
            self.agenda.after(0.25, lambda: self._until_empty(pair, deadline, again_s))
            return
        self.end_pair(pair)
        self.agenda.after(again_s, lambda: self._back(pair.zone))

    def _back(self, zone: int) -> None:
        self.start_pair(zone)
        self.broadcast()

    def _report(self) -> None:
        for pair in self.pairs:
            if pair.state == "up":
                pair.report()
        self.broadcast()
        rows = sorted(pair.rows for pair in self.present() if pair.state == "up")
        mean, last = sum(rows) / max(1, len(rows)), len(rows) - 1
        most, p99, median = (rows[int(share * last)] if rows else 0 for share in (1.0, 0.99, 0.5))
        queued = sum(pair.queued for pair in self.pairs)
        self.samples.append(Sample(self.agenda.now, mean, most, p99, median, queued))

    def _decide(self) -> None:
        """The number of pairs that the policy wants; the fleet has no machines for more."""
        signals = [pair.signals() for pair in self.pairs if pair.state == "up"]
        requests = float(len(self.open))
        tick = Tick(self.agenda.now, self.wanted, signals, requests, 0.0)
        self.wanted = self._scaling.pairs_for(tick)

    def _next(self) -> None:
        if self.closed:
            return
        request = self._clients.next_request(self.agenda.now)
        self.begun += 1
        self.open[request] = None
        self._any_router().take(request)

    def _any_router(self) -> SimulatedRouter:
        while not (router := self.draw.choice(self.routers)).up:
            continue
        return router

    def _done(self, request: Request) -> None:
        request.ends += 1
        del self.open[request]
        self.ended.append(request)
        self._clients.ended(request)
        self._next()

    def _failed(self, request: Request, error: TwoTowerError) -> None:
        request.ends += 1
        del self.open[request]
        self.failed.append((request, error))
        self._next()

    def _cut(self, request: Request) -> None:
        """The client resumes it with the blocks that it has."""
        self.cut += 1
        pause = self.draw.random() * RESUME_S
        self.agenda.after(pause, lambda: self._any_router().take(request))
