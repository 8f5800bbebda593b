"""The choice of a row's pair: by losses of pairs and by free places; `affinity` has the choice by
the beginning of its prompt.

Moves: a row that waits for a place goes to a pair that has one. A pair does not say which rows wait
in it, but it lets rows in as they come: a row that has as many others of this router before it as
the pair has places has none. The oldest of those that wait move, as many as find room elsewhere.

Breaker: a pair whose tower has died refuses at once and so has the shortest queue of all. Without a
breaker it would draw every new attempt until the health check has replaced it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

# Losses within WINDOW_S after which a pair is avoided, and the time until it is probed.
FAILURES = 2
WINDOW_S = 30.0
REST_S = 2.0


@dataclass(frozen=True)
class Room:
    """`places` rows that a pair works on at once, and the `share` of them that is this router's."""

    places: int
    share: int

    @classmethod
    def of(cls, places: int, num_routers: int) -> Room:
        """Each of the routers has an equal share, at least one place."""
        return cls(places, max(1, places // num_routers))


@dataclass
class PairRows:
    """A pair's attempts: `begun` have brought a block, `waiting` have not and are in the order in
    which the pair got them, `coming` are sent to it and not there yet."""

    begun: set[str] = field(default_factory=set)
    waiting: dict[str, None] = field(default_factory=dict)
    coming: set[str] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.begun) + len(self.waiting) + len(self.coming)

    def drop(self, row_id: str) -> None:
        """Takes an attempt off, if it is here."""
        self.begun.discard(row_id)
        self.waiting.pop(row_id, None)
        self.coming.discard(row_id)


class Breaker:
    """The recent losses of each pair; for one thread at a time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._losses: dict[str, list[float]] = {}
        self._probed: dict[str, float] = {}

    def worked(self, pair: str) -> None:
        """Forgets the losses of a pair: it has brought a block, or is gone."""
        self._losses.pop(pair, None)
        self._probed.pop(pair, None)

    def lost(self, pair: str) -> None:
        """Notes that a pair has lost an attempt."""
        now = self._clock()
        recent = [at for at in self._losses.get(pair, ()) if now - at < WINDOW_S]
        self._losses[pair] = [*recent[1 - FAILURES :], now]
        self._probed[pair] = now

    def avoids(self, pair: str) -> bool:
        """True if a pair has lost too much to be given more."""
        return len(self._losses.get(pair, ())) >= FAILURES

    def ranked(self, pairs: Sequence[str], *, probe: bool) -> list[Sequence[str]]:
        """The pairs to choose from, in ranks: those that work, or all if none does.

        With `probe`, a pair that has been avoided for REST_S comes before them: what it does with
        this attempt decides.
        """
        if not self._losses:
            # The usual case, for which a thousand pairs need not be looked through.
            return [pairs]
        for pair in set(self._losses) - set(pairs):
            self.worked(pair)
        avoided = {pair: None for pair in self._losses if self.avoids(pair)}
        if not avoided:
            return [pairs]
        due = [pair for pair in avoided if self._clock() - self._probed[pair] >= REST_S]
        working = [pair for pair in pairs if pair not in avoided]
        if not working:
            return [pairs]
        if not (probe and due):
            return [working]
        self._probed[due[0]] = self._clock()
        return [due[:1], working]


def target_of(row_id: str, here: PairRows, rows: Mapping[str, int], room: Room) -> str | None:
    """The pair that an attempt `here` should move to; None if it stays.

    `rows` are this router's attempts on each pair that works.
    """
    free = {pair: room.share - count for pair, count in rows.items() if count < room.share}
    if not free:
        return None
    # Those before have a place, or may have one; those behind wait for the next look.
    first = max(0, room.places - len(here.begun))
    if row_id not in islice(here.waiting, first, first + sum(free.values())):
        return None
    return max(free, key=lambda pair: free[pair])
