"""What this router knows of the pairs: which there are, which work, and which has which attempt."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from twotower.deployments import moves
from twotower.deployments.assignments import Assignments
from twotower.deployments.breaker import Breaker


class Pairs:
    """Assignments and breaker of all pairs. Serve asks in a thread of its own, hence the lock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._lock = threading.Lock()
        self._assignments = Assignments()
        self._breaker = Breaker(clock)
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

    def ended(self, row_id: str) -> None:
        """An attempt is over, however it ended."""
        with self._lock:
            self._assignments.ended(row_id)

    def moved(self, row_id: str, next_id: str, room: int) -> bool:
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

    def _target_of_waiting(self, row_id: str, room: int) -> str | None:
        pair = self._assignments.pair_of(row_id)
        if pair is None:
            return None
        here = self._assignments.on(pair)
        if len(here) <= room:
            # All have a place: the usual case, for which no other pair need be looked at.
            return None
        counts = self._assignments.counts()
        rows = {up: counts.get(up, 0) for up in self._up if not self._breaker.avoids(up)}
        return moves.target_of(row_id, here, rows, room)


# Serve makes a deployment's PairChooser itself, in the process of the router that it serves.
PAIRS = Pairs()
