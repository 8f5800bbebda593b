"""Which pairs this router avoids for a while: those that lose what they are given.

A pair whose tower has died refuses at once and so has the shortest queue of all: without this it
would draw every new attempt until the health check has replaced it.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

FAILURES = 2
WINDOW_S = 30.0
REST_S = 2.0


class Breaker:
    """The recent losses of each pair. Serve asks in a thread of its own, hence the lock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        # The pair of each attempt, and whether it was one to avoid already.
        self._pair_of: dict[str, tuple[str, bool]] = {}
        self._losses: dict[str, list[float]] = {}
        self._probed: dict[str, float] = {}

    def routed(self, row_id: str, pair: str) -> None:
        """An attempt has gone to a pair."""
        with self._lock:
            self._pair_of[row_id] = pair, self._avoided(pair)

    def worked(self, row_id: str) -> None:
        """An attempt has brought a block: its pair works."""
        with self._lock:
            self._forget(self._pair_of.get(row_id, ("", False))[0])

    def lost(self, row_id: str) -> bool:
        """An attempt was lost with its pair; whether that had to be expected of the pair."""
        with self._lock:
            if row_id not in self._pair_of:
                return False
            pair, expected = self._pair_of[row_id]
            now = self._clock()
            recent = [at for at in self._losses.get(pair, ()) if now - at < WINDOW_S]
            self._losses[pair] = [*recent[1 - FAILURES :], now]
            self._probed[pair] = now
            return expected

    def ended(self, row_id: str) -> None:
        """An attempt is over, however it ended."""
        with self._lock:
            self._pair_of.pop(row_id, None)

    def rows(self) -> dict[str, int]:
        """Attempts that each pair has of this router."""
        with self._lock:
            return dict(Counter(pair for pair, _ in self._pair_of.values()))

    def ranked(self, pairs: Sequence[str], *, probe: bool) -> list[list[str]]:
        """The pairs to choose from, in ranks: those that work, or all if none does.

        With `probe`, one that has been avoided for REST_S comes before them: what it does with
        this attempt decides.
        """
        with self._lock:
            for pair in set(self._losses) - set(pairs):
                self._forget(pair)
            avoided = [pair for pair in pairs if self._avoided(pair)]
            due = [pair for pair in avoided if self._clock() - self._probed[pair] >= REST_S]
            working = [pair for pair in pairs if pair not in avoided]
            if not working:
                return [list(pairs)]
            if not (probe and due):
                return [working]
            self._probed[due[0]] = self._clock()
            return [due[:1], working]

    def _avoided(self, pair: str) -> bool:
        return len(self._losses.get(pair, ())) >= FAILURES

    def _forget(self, pair: str) -> None:
        self._losses.pop(pair, None)
        self._probed.pop(pair, None)


# Serve makes a deployment's PairChooser itself, in the process of the router that it serves.
PAIRS = Breaker()
