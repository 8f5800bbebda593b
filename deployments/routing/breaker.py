"""Which pairs this router avoids for a while: those that lose what they are given.

A pair whose tower has died refuses at once and so has the shortest queue of all: without this it
would draw every new attempt until the health check has replaced it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

FAILURES = 2
WINDOW_S = 30.0
REST_S = 2.0


class Breaker:
    """The recent losses of each pair; for one thread at a time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._losses: dict[str, list[float]] = {}
        self._probed: dict[str, float] = {}

    def worked(self, pair: str) -> None:
        """A pair has brought a block, or is gone."""
        self._losses.pop(pair, None)
        self._probed.pop(pair, None)

    def lost(self, pair: str) -> None:
        """A pair has lost an attempt."""
        now = self._clock()
        recent = [at for at in self._losses.get(pair, ()) if now - at < WINDOW_S]
        self._losses[pair] = [*recent[1 - FAILURES :], now]
        self._probed[pair] = now

    def avoids(self, pair: str) -> bool:
        """Whether a pair has lost too much to be given more."""
        return len(self._losses.get(pair, ())) >= FAILURES

    def ranked(self, pairs: Sequence[str], *, probe: bool) -> list[list[str]]:
        """The pairs to choose from, in ranks: those that work, or all if none does.

        With `probe`, one that has been avoided for REST_S comes before them: what it does with
        this attempt decides.
        """
        for pair in set(self._losses) - set(pairs):
            self.worked(pair)
        avoided = [pair for pair in pairs if self.avoids(pair)]
        due = [pair for pair in avoided if self._clock() - self._probed[pair] >= REST_S]
        working = [pair for pair in pairs if pair not in avoided]
        if not working:
            return [list(pairs)]
        if not (probe and due):
            return [working]
        self._probed[due[0]] = self._clock()
        return [due[:1], working]
