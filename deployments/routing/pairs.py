"""What this router knows of the pairs: which there are, which work, and which has which attempt."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from twotower.deployments.routing import moves
from twotower.deployments.routing.assignments import Assignments
from twotower.deployments.routing.breaker import Breaker
from twotower.deployments.routing.moves import Room

# A pair that had no place for a row that was moved there is no target for so long.
FULL_S = 5.0


class Pairs:
    """Assignments and breaker of all pairs. Serve asks in a thread of its own, hence the lock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._lock = threading.Lock()
        self._assignments = Assignments()
        self._breaker = Breaker(clock)
        self._clock = clock
        self._full: dict[str, float] = {}
        self._up: tuple[str, ...] = ()

    def present(self, pairs: Sequence[str]) -> None:
        """Serve has these pairs, and no others, for new attempts."""
        with self._lock:
            self._up = tuple(pairs)

    def opened(self, row_id: str) -> None:
        """An attempt begins."""
        with self._lock:
            self._assignments.opened(row_id)

    def routed(self, row_id: str, pair: str) -> None:
        """An attempt has gone to a pair."""
        with self._lock:
            target = self._assignments.target_of(row_id)
            if target not in (None, pair):
                self._full[target] = self._clock()
            self._assignments.routed(row_id, pair, suspect=self._breaker.avoids(pair))

    def worked(self, row_id: str) -> None:
        """An attempt has brought a block: its pair works."""
        with self._lock:
            self._assignments.began(row_id)
            pair = self._assignments.pair_of(row_id)
            if pair is not None:
                self._breaker.worked(pair)

    def lost(self, row_id: str) -> bool:
        """An attempt was lost with its pair; whether that had to be expected of the pair."""
        with self._lock:
            pair = self._assignments.pair_of(row_id)
            if pair is not None:
                self._breaker.lost(pair)
            return self._assignments.is_suspect(row_id)

    def refused(self, row_id: str) -> None:
        """The pair of an attempt has no place for it, not even in its queue."""
        with self._lock:
            pair = self._assignments.pair_of(row_id)
            if pair is not None:
                self._full[pair] = self._clock()

    def ended(self, row_id: str) -> None:
        """An attempt is over, however it ended."""
        with self._lock:
            self._assignments.ended(row_id)

    def moved(self, row_id: str, next_id: str, room: Room) -> bool:
        """Whether an attempt waits on its pair and another has room for it.

        If so it is over here, and the attempt `next_id` counts there from now on.
        """
        with self._lock:
            target = self._target_of_waiting(row_id, room)
            if target is None:
                return False
            self._assignments.ended(row_id)
            self._assignments.sent(next_id, target)
            return True

    def target_of(self, row_id: str) -> str | None:
        """The pair that a moved attempt is sent to; None for any other attempt."""
        with self._lock:
            return self._assignments.target_of(row_id)

    def rows(self) -> dict[str, int]:
        """Attempts that each pair has of this router."""
        with self._lock:
            return self._assignments.counts()

    def ranked(self, pairs: Sequence[str], *, probe: bool) -> list[list[str]]:
        """As Breaker.ranked."""
        with self._lock:
            return self._breaker.ranked(pairs, probe=probe)

    def _target_of_waiting(self, row_id: str, room: Room) -> str | None:
        pair = self._assignments.pair_of(row_id)
        if pair is None:
            return None
        here = self._assignments.on(pair)
        if len(here) <= room.places:
            # All have a place: the usual case, for which no other pair need be looked at.
            return None
        counts = self._assignments.counts()
        since = self._clock() - FULL_S
        self._full = {full: at for full, at in self._full.items() if at > since}
        avoided = {up for up in self._up if up in self._full or self._breaker.avoids(up)}
        rows = {up: counts.get(up, 0) for up in self._up if up not in avoided}
        return moves.target_of(row_id, here, rows, room)


# Serve makes a deployment's PairChooser itself, in the process of the router that it serves.
PAIRS = Pairs()
