"""This router's table of pairs: those that are up, those to avoid, and the attempts on each."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from twotower.deployments.routing.policy import Breaker, PairRows, Room, target_of

# A pair that had no place for a row that was moved there is no target for so long.
FULL_S = 5.0
# Counters of a pair, by tower and by name.
Report = Mapping[str, Mapping[str, float]]


@dataclass
class _Attempt:
    """`pair` has the attempt, None until one does; `suspect` if that pair was avoided when it got
    the attempt. `target` is the pair that a moved attempt is sent to."""

    pair: str | None = None
    suspect: bool = False
    target: str | None = None


class Pairs:
    """The attempts that are under way, by name and by pair, and the breaker of all pairs.

    Serve asks in another thread, hence the lock.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._lock = threading.Lock()
        self._attempts: dict[str, _Attempt] = {}
        self._rows: dict[str, PairRows] = {}
        self._breaker = Breaker(clock)
        self._clock = clock
        self._full: dict[str, float] = {}
        self._up: tuple[str, ...] = ()
        self._reports: dict[str, Report] = {}

    def present(self, pairs: Sequence[str]) -> None:
        """Notes the pairs that Serve has for new attempts; there are no others."""
        with self._lock:
            self._up = tuple(pairs)

    def reported(self, reports: Mapping[str, Report]) -> None:
        """Takes what the pairs have last said of themselves, in place of what they said before."""
        with self._lock:
            self._reports = {pair: report for pair, report in reports.items() if report}

    def reports(self) -> dict[str, Report]:
        """Counters of the pairs that have reported any: by pair, by tower and by name."""
        with self._lock:
            return dict(self._reports)

    def opened(self, row_id: str) -> None:
        """Begins to follow an attempt; one that is not opened, or has ended, is not followed."""
        with self._lock:
            self._attempts.setdefault(row_id, _Attempt())

    def routed(self, row_id: str, pair: str) -> None:
        """Notes that a pair has got an attempt, the last of those that wait there."""
        with self._lock:
            target = self._attempt(row_id).target
            if target not in (None, pair):
                self._full[target] = self._clock()
            if row_id not in self._attempts:
                # Serve's thread may not have heard yet that the attempt is over.
                return
            self._end(row_id)
            self._attempts[row_id] = _Attempt(pair, self._breaker.avoids(pair))
            self._on(pair).waiting[row_id] = None

    def worked(self, row_id: str) -> str | None:
        """Notes that an attempt has brought a block: its pair works. Returns the pair."""
        with self._lock:
            pair = self._attempt(row_id).pair
            if pair is not None:
                rows = self._on(pair)
                rows.drop(row_id)
                rows.begun.add(row_id)
                self._breaker.worked(pair)
            return pair

    def lost(self, row_id: str) -> bool:
        """Notes that an attempt was lost with its pair; True if that was to be expected of it."""
        with self._lock:
            attempt = self._attempt(row_id)
            if attempt.pair is not None:
                self._breaker.lost(attempt.pair)
            return attempt.suspect

    def gone(self, row_id: str) -> bool:
        """True if an attempt's pair is none of those that Serve has for new attempts: it is ending,
        or has ended."""
        with self._lock:
            pair = self._attempt(row_id).pair
            return pair is not None and pair not in self._up

    def refused(self, row_id: str) -> None:
        """Notes that an attempt's pair has no place for it, not even in its queue."""
        with self._lock:
            pair = self._attempt(row_id).pair
            if pair is not None:
                self._full[pair] = self._clock()

    def ended(self, row_id: str) -> None:
        """Stops to follow an attempt, however it ended; an unknown one is fine."""
        with self._lock:
            self._end(row_id)

    def moved(self, row_id: str, next_id: str, room: Room) -> bool:
        """True if an attempt waits on its pair and another has room for it.

        If so it is over here, and the attempt `next_id` counts there from now on.
        """
        with self._lock:
            target = self._target_of_waiting(row_id, room)
            if target is None:
                return False
            self._end(row_id)
            self._attempts[next_id] = _Attempt(target=target)
            self._on(target).coming.add(next_id)
            return True

    def target_of(self, row_id: str) -> str | None:
        """The pair that a moved attempt is sent to; None for any other attempt."""
        with self._lock:
            return self._attempt(row_id).target

    def rows(self) -> dict[str, int]:
        """Attempts of each pair that has any of this router, those that are coming included."""
        with self._lock:
            return self._counts()

    def ranked(self, pairs: Sequence[str], *, probe: bool) -> list[list[str]]:
        """Ranks of pairs to choose from; see Breaker.ranked."""
        with self._lock:
            return self._breaker.ranked(pairs, probe=probe)

    def _target_of_waiting(self, row_id: str, room: Room) -> str | None:
        pair = self._attempt(row_id).pair
        if pair is None:
            return None
        here = self._on(pair)
        if len(here) <= room.places:
            # All have a place: the usual case, for which no other pair need be looked at.
            return None
        counts = self._counts()
        since = self._clock() - FULL_S
        self._full = {full: at for full, at in self._full.items() if at > since}
        avoided = {up for up in self._up if up in self._full or self._breaker.avoids(up)}
        rows = {up: counts.get(up, 0) for up in self._up if up not in avoided}
        return target_of(row_id, here, rows, room)

    def _attempt(self, row_id: str) -> _Attempt:
        return self._attempts.get(row_id, _Attempt())

    def _on(self, pair: str) -> PairRows:
        return self._rows.setdefault(pair, PairRows())

    def _counts(self) -> dict[str, int]:
        return {pair: len(rows) for pair, rows in self._rows.items()}

    def _end(self, row_id: str) -> None:
        attempt = self._attempts.pop(row_id, _Attempt())
        for pair in (attempt.pair, attempt.target):
            if pair is not None:
                self._on(pair).drop(row_id)
                if not self._rows[pair]:
                    del self._rows[pair]


# Serve makes a deployment's PairChooser itself, in the process of the router that it serves.
PAIRS = Pairs()
