"""Simulated time: what happens next, and when."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count


class Agenda:
    """Calls in the order of their times; calls of one time in the order in which they came."""

    def __init__(self) -> None:
        self.now = 0.0
        self._calls: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()

    def clock(self) -> float:
        """The time, for classes that take a clock."""
        return self.now

    def at(self, time: float, call: Callable[[], None]) -> None:
        """Makes a call at a time, at once if that has passed."""
        heapq.heappush(self._calls, (max(time, self.now), next(self._numbers), call))

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """Makes a call later."""
        self.at(self.now + seconds, call)

    def every(self, seconds: float, call: Callable[[], None], first: float = 0.0) -> None:
        """Makes a call again and again, from the time `first` on."""

        def again() -> None:
            call()
            self.after(seconds, again)

        self.at(first, again)

    def run(self, until: float) -> None:
        """Makes the calls up to a time, which is then the present."""
        while self._calls and self._calls[0][0] <= until:
            self.now, _, call = heapq.heappop(self._calls)
            call()
        self.now = until
