"""What happens to a fleet, one after another: steady load, losses, a rolling update, the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.fleet.figures import Mark, between, mark, totals
from benchmarks.fleet.fleet import Fleet, Size

# After the warm-up, chats are in their second turns and later ones.
WARM_UP_S, STEADY_S = 40.0, 20.0
PAIR_S, ROUTER_S = 5.0, 5.0
# Ray takes so long to find that machines are gone; new ones are up so long after that.
NOTICE_S, BACK_S = 15.0, 10.0
ZONE_S = NOTICE_S + BACK_S + 10.0
# So many of the pairs at a time and so many times: they end their rows for so long, then they load.
WAVE, WAVES = 0.1, 1
DRAIN_S, LOAD_S = 15.0, 5.0
# The longest request of a hundred thousand has ended by then.
END_S = 3600.0


class Played:
    """The scenario over a fleet: figures by the names of its times."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._marks: dict[str, tuple[Mark, Mark]] = {}
        self._struck: dict[str, int] = {}

    def play(self) -> dict[str, Any]:
        """Plays all of it, to the end of the last request."""
        fleet = self._fleet
        self._time("warm_up", WARM_UP_S)
        self._time("steady", STEADY_S)
        self._time("pair_lost", PAIR_S, lambda: fleet.lose_pair(LOAD_S))
        self._time("router_lost", ROUTER_S, fleet.lose_router)
        self._time("zone_lost", ZONE_S, lambda: fleet.lose_zone(0, NOTICE_S, BACK_S))
        self._time("rolling_update", WAVES * (DRAIN_S + LOAD_S) + 5.0, self._roll)
        fleet.closed = True
        while fleet.open and fleet.agenda.now < END_S:
            fleet.agenda.run(fleet.agenda.now + 10.0)
        return self.figures()

    def steady(self) -> dict[str, Any]:
        """Figures of the steady load alone, of requests that have ended since."""
        self._time("warm_up", WARM_UP_S)
        self._time("steady", STEADY_S)
        return {"steady": between(self._fleet, *self._marks["steady"])}

    def figures(self) -> dict[str, Any]:
        """Figures of each time, with the rows, requests or pairs struck, and of the whole."""
        fleet = self._fleet
        times = {
            name: {**({"struck": self._struck[name]} if name in self._struck else {}), **found}
            for name, (begin, end) in self._marks.items()
            for found in [between(fleet, begin, end)]
        }
        return {"times": times, "totals": totals(fleet), "pairs_wanted": fleet.wanted}

    def _time(self, name: str, seconds: float, begin: Callable[[], int] | None = None) -> None:
        fleet = self._fleet
        before = mark(fleet)
        if begin is not None:
            self._struck[name] = begin()
        fleet.agenda.run(fleet.agenda.now + seconds)
        self._marks[name] = (before, mark(fleet))

    def _roll(self) -> int:
        """The oldest pairs first; returns how many."""
        fleet = self._fleet
        size = max(1, round(WAVE * fleet.size.pairs))
        for wave in range(WAVES):
            pairs = fleet.present()[wave * size : (wave + 1) * size]
            drain = partial(fleet.drain, pairs, DRAIN_S, LOAD_S)
            fleet.agenda.after(wave * (DRAIN_S + LOAD_S), drain)
        return WAVES * size


def compare(size: Size, plain: Size, seed: int) -> dict[str, Any]:
    """Figures of the whole scenario, and of the steady load without affinity."""
    begin = time.process_time()
    found = Played(Fleet(size, seed)).play()
    without = Played(Fleet(plain, seed)).steady()["steady"]
    return {**found, "without_affinity": without, "cpu_s": round(time.process_time() - begin, 1)}
