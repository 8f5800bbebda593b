"""A pair of towers in simulated time: slots, a queue, and a cache of prefixes."""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

from ray.serve._private.common import DeploymentID, ReplicaID

from benchmarks.fleet.agenda import Agenda
from benchmarks.fleet.load import Request
from twotower.deployments.pair.autoscaling import PairSignals

DEPLOYMENT = DeploymentID("TowerPair", "twotower")


@dataclass(frozen=True)
class PairFigures:
    """Capacity of a pair and its times.

    A block of a row takes `block_s` and `row_block_s` more for each row: 64 rows write 150 of them
    a second. Reading a token takes `token_blocks` of a block's time. The cache keeps
    `cache_entries` snapshots.
    """

    slots: int = 128
    queue: int = 256
    block_s: float = 0.2
    row_block_s: float = 0.0035
    token_blocks: float = 0.0002
    cache_entries: int = 256


class PrefixCache:
    """Which beginnings a pair has read: of a system prompt, and of a chat up to some token. Those
    not used for the longest time leave first."""

    def __init__(self, entries: int) -> None:
        self._entries = entries
        self._tokens: OrderedDict[tuple[str, int], int] = OrderedDict()

    def cached(self, request: Request) -> int:
        """Tokens at the request's beginning that are there."""
        chat, own = request.chat, self._tokens.get(("chat", request.chat.number), 0)
        if own or chat.system is None:
            return own
        return self._tokens.get(("system", chat.system), 0)

    def read(self, request: Request) -> None:
        """The request's tokens have been read."""
        chat = request.chat
        if chat.system is not None:
            self._put(("system", chat.system), chat.system_tokens)
        self._put(("chat", chat.number), request.tokens)

    def _put(self, key: tuple[str, int], tokens: int) -> None:
        self._tokens[key] = tokens
        self._tokens.move_to_end(key)
        if len(self._tokens) > self._entries:
            self._tokens.popitem(last=False)


class PrefixCounts:
    """Tokens that attempts had to read, those that their pairs had cached, and those that one cache
    of all pairs would have had: what a router that knows every cache could get at most."""

    def __init__(self, entries: int) -> None:
        self.tokens = self.cached = self.ideal = 0
        self._pool = PrefixCache(entries)

    def begins(self, request: Request, cache: PrefixCache) -> int:
        """An attempt begins in a pair of that cache; returns the tokens that it finds there."""
        cached = cache.cached(request)
        self.tokens += request.tokens
        self.cached += cached
        self.ideal += self._pool.cached(request)
        cache.read(request)
        self._pool.read(request)
        return cached

    def ends(self, request: Request, cache: PrefixCache) -> None:
        """An attempt has ended in a pair of that cache, with its output read."""
        cache.read(request)
        self._pool.read(request)


@dataclass(eq=False)
class Row:
    """An attempt in a pair; `first_block` and `ended` are told of it. `first` and `last` are the
    pair's progress at which its first and its last block are there."""

    request: Request
    first_block: Callable[[], None]
    ended: Callable[[], None]
    lost: Callable[[], None]
    first: float = math.inf
    last: float = math.inf
    here: bool = True

    def blocks_at(self, progress: float) -> int:
        """Blocks that it has written, less those of attempts before."""
        if progress < self.first:
            return 0
        return int(progress - self.first + 1e-6) + 1


class SimulatedPair:
    """A replica as Serve's router sees it; all its rows advance alike, the slower the more."""

    def __init__(
        self, name: str, figures: PairFigures, agenda: Agenda, zone: int, counts: PrefixCounts
    ) -> None:
        self.replica_id = ReplicaID(name, DEPLOYMENT)
        self.max_ongoing_requests = figures.slots + figures.queue
        self.routing_stats: dict[str, dict[str, float]] = {}
        self.name, self.zone, self.figures = name, zone, figures
        # "up"; "silent": lost, and nobody has heard of it; "gone".
        self.state = "up"
        self.silent_since = math.inf
        self.cache = PrefixCache(figures.cache_entries)
        self._counts = counts
        self._agenda = agenda
        self._running: dict[Row, None] = {}
        self._queue: deque[Row] = deque()
        self._waiting = 0
        self._progress, self._progress_at, self._due = 0.0, 0.0, math.inf
        self._steps: list[tuple[float, int, Row]] = []
        self._numbers = count()

    @property
    def rows(self) -> int:
        """Rows in slots and in the queue."""
        return len(self._running) + self._waiting

    @property
    def free(self) -> int:
        """Slots without a row."""
        return self.figures.slots - len(self._running)

    @property
    def queued(self) -> int:
        """Rows in the queue."""
        return self._waiting

    def signals(self) -> PairSignals:
        """The pair's load for the number of pairs."""
        running = len(self._running)
        return PairSignals(running, self._waiting, self.free, read_at=self._agenda.now)

    def report(self) -> None:
        """Says the pair's load, as it reaches the routers with Serve's next message."""
        context = {
            "rows": float(self.rows),
            "queued_rows": float(self._waiting),
            "clock_seconds": self._agenda.now,
        }
        self.routing_stats = {"context": context}

    def take(self, row: Row) -> None:
        """A row comes, into a slot or behind those that wait."""
        if self.state != "up" or self.free <= 0:
            self._queue.append(row)
            self._waiting += 1
            return
        self._advance()
        self._begin(row)
        self._schedule()

    def drop(self, row: Row) -> None:
        """A row goes before its end."""
        row.here = False
        if row not in self._running:
            self._waiting -= 1
            return
        self._advance()
        self._leave(row)
        self._schedule()

    def commit(self, row: Row) -> None:
        """Notes in the request what an attempt that is lost now has written."""
        self._advance()
        row.request.committed += row.blocks_at(self._progress)

    def stop(self) -> None:
        """Nothing advances any more; its rows have not heard of it."""
        self._advance()
        self.state = "silent"
        self.silent_since = self._agenda.now

    def end(self) -> None:
        """It is gone; its rows hear of it."""
        if self.state == "up":
            self.stop()
        self.state = "gone"
        rows = [*self._running, *(row for row in self._queue if row.here)]
        self._running.clear()
        self._queue.clear()
        self._waiting = 0
        for row in rows:
            self.commit(row)
            row.here = False
            row.lost()

    def _begin(self, row: Row) -> None:
        request = row.request
        cached = self._counts.begins(request, self.cache)
        self._running[row] = None
        reading = max(0, request.tokens - cached) * self.figures.token_blocks
        row.first = self._progress + reading + 1
        row.last = row.first + request.blocks - request.committed - 1
        self._push(row.first, row)
        if row.last > row.first:
            self._push(row.last, row)

    def _push(self, progress: float, row: Row) -> None:
        heapq.heappush(self._steps, (progress, next(self._numbers), row))

    def _leave(self, row: Row) -> None:
        del self._running[row]
        while self._queue and self.free > 0 and self.state == "up":
            following = self._queue.popleft()
            if following.here:
                self._waiting -= 1
                self._begin(following)

    def _per_block(self) -> float:
        return self.figures.block_s + self.figures.row_block_s * len(self._running)

    def _advance(self) -> None:
        now = self._agenda.now
        if self.state == "up":
            self._progress += (now - self._progress_at) / self._per_block()
        self._progress_at = now

    def _schedule(self) -> None:
        while self._steps and not self._steps[0][2].here:
            heapq.heappop(self._steps)
        if not self._steps:
            return
        due = self._agenda.now + (self._steps[0][0] - self._progress) * self._per_block()
        if due < self._due - 1e-9:
            self._due = due
            self._agenda.at(due, lambda: self._step(due))

    def _step(self, due: float) -> None:
        if due != self._due or self.state != "up":
            return
        self._due = math.inf
        self._advance()
        while self._steps and self._steps[0][0] <= self._progress + 1e-9:
            _, _, row = heapq.heappop(self._steps)
            if row.here:
                self._passed(row)
        self._schedule()

    def _passed(self, row: Row) -> None:
        """The first or the last block of a row is there."""
        if row.request.first_block_at is None:
            row.request.first_block_at = self._agenda.now
        if row.last > self._progress + 1e-9:
            row.first_block()
            return
        row.here = False
        row.request.committed = row.request.blocks
        self._counts.ends(row.request, self.cache)
        self._leave(row)
        row.ended()


def replica_of(pair: Any) -> SimulatedPair:
    """The pair behind what Serve's router has chosen."""
    assert isinstance(pair, SimulatedPair)
    return pair
