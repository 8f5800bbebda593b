"""This router's table of pairs: those that are up, those to avoid, and the attempts on each."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from twotower.deployments.routing.affinity import Beginnings, Place, chain_of, preferred
from twotower.deployments.routing.loads import Loads, Report
from twotower.deployments.routing.policy import Breaker, PairRows, Room, target_of

# A pair that had no place for a row that was moved there is no target for so long.
FULL_S = 5.0
# Of the places that are free by the reports, the share that all routers together fill at a look:
# there are about two looks to a report.
MOVED_SHARE = 0.5
# Moves of a request by reports, which do not say whose rows wait: a row that its pair reads already
# may go, too.
MOST_MOVES = 2
# Pairs of a rank that Serve asks for the length of their queues.
CHOICES = 2


@dataclass
class _Attempt:
    """`pair` has the attempt since `since`, None until one does; `suspect` if that pair was avoided
    when it got the attempt. `target` is the pair that a moved attempt is sent to, after so many
    `moves` by reports. `place` is where its prompt belongs, once that was asked for."""

    pair: str | None = None
    suspect: bool = False
    target: str | None = None
    since: float = 0.0
    moves: int = 0
    place: Place | None = None


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
        self._loads = Loads()
        self._beginnings = Beginnings()

    def routers(self, num_routers: int) -> None:
        """Notes how many routers there are, this one included."""
        with self._lock:
            self._loads.num_routers = num_routers

    def present(self, pairs: Sequence[str]) -> None:
        """Notes the pairs that Serve has for new attempts; there are no others."""
        with self._lock:
            up = tuple(pairs)
            if up != self._up:
                self._up = up
                self._loads.present(up, self._counts())

    def reported(self, reports: Mapping[str, Report]) -> None:
        """Takes what the pairs have last said of themselves, in place of what they said before."""
        with self._lock:
            self._reports = {pair: report for pair, report in reports.items() if report}
            self._loads.reported(self._reports, self._clock())

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
            before, suspect = self._attempts[row_id], self._breaker.avoids(pair)
            self._end(row_id)
            self._attempts[row_id] = replace(
                before, pair=pair, suspect=suspect, target=None, since=self._clock()
            )
            self._on(pair).waiting[row_id] = None
            self._loads.count(pair, len(self._on(pair)))

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
            attempt = self._attempt(row_id)
            moves = attempt.moves
            target = self._target_of_waiting(row_id, room)
            if target is None:
                target, moves = self._target_by_reports(row_id, room), moves + 1
            if target is None:
                return False
            self._end(row_id)
            self._attempts[next_id] = _Attempt(target=target, moves=moves, place=attempt.place)
            self._on(target).coming.add(next_id)
            self._loads.count(target, len(self._on(target)))
            return True

    def target_of(self, row_id: str) -> str | None:
        """The pair that a moved attempt is sent to; None for any other attempt."""
        with self._lock:
            return self._attempt(row_id).target

    def rows(self) -> dict[str, int]:
        """Attempts of each pair that has any of this router, those that are coming included."""
        with self._lock:
            return self._counts()

    def choice(self, row_id: str | None, prompt: Sequence[int] = ()) -> list[list[str]]:
        """Pairs to ask for the length of their queues, in ranks, for an attempt at a prompt, or for
        another call: the pair that a moved attempt is sent to, one that is to be probed, that which
        the prompt belongs to, and CHOICES of all."""
        chain = chain_of(prompt)
        with self._lock:
            target = self._attempt(row_id).target if row_id is not None else None
            # A row that is sent to a pair says nothing about another.
            ranks = self._breaker.ranked(self._up, probe=row_id is not None and target is None)
            working = ranks[-1]
            # Serve asks again while no pair takes an attempt: its prompt counts once.
            asked = self._attempt(row_id) if row_id is not None else _Attempt()
            own = self._belongs(asked, chain, working) if chain else None
        chosen = [random.sample(rank, min(CHOICES, len(rank))) for rank in ranks]
        if own is not None:
            # Behind a pair that is being probed, before the others.
            chosen.insert(len(chosen) - 1, [own])
        if target is not None and target in working:
            chosen.insert(0, [target])
        return chosen

    def _belongs(self, asked: _Attempt, chain: list[int], working: Sequence[str]) -> str | None:
        """The pair that an attempt at a prompt of that chain belongs to, of those that work."""
        fits = self._loads.fits()
        if len(working) < len(self._up):
            fits &= self._loads.among(working)
        if asked.place is None:
            asked.place = self._beginnings.place(chain)
        index = preferred(asked.place, self._loads.keys, fits)
        return None if index is None else self._up[index]

    def _target_of_waiting(self, row_id: str, room: Room) -> str | None:
        pair = self._attempt(row_id).pair
        if pair is None:
            return None
        here = self._on(pair)
        if len(here) <= room.places:
            # All have a place: the usual case, for which no other pair need be looked at.
            return None
        counts, avoided = self._counts(), self._no_targets()
        rows = {up: counts.get(up, 0) for up in self._up if up not in avoided}
        return target_of(row_id, here, rows, room)

    def _target_by_reports(self, row_id: str, room: Room) -> str | None:
        """Of several routers none has the rows that fill a pair: that rows wait there, and where
        there is room, they learn from reports, which all of them see. So each moves its rows with
        a probability with which all together fill the room."""
        attempt = self._attempt(row_id)
        pair, loads = attempt.pair, self._loads
        if loads.num_routers == 1 or pair is None or attempt.moves == MOST_MOVES:
            return None
        queued = loads.queued_since(pair, attempt.since)
        # A pair lets rows in as they come: those that wait came last, about as many of each router.
        waiting = list(self._on(pair).waiting)[-math.ceil(queued / loads.num_routers) :]
        if not queued or row_id not in waiting:
            return None
        free, avoided = loads.free(room.places), self._no_targets()
        if avoided:
            free[loads.among(list(avoided))] = 0.0
        if random.random() * loads.queued() >= MOVED_SHARE * free.sum():
            return None
        return random.choices(self._up, weights=free.tolist())[0]

    def _no_targets(self) -> set[str]:
        """Pairs that are up and had no place lately, or have lost too much."""
        since = self._clock() - FULL_S
        self._full = {full: at for full, at in self._full.items() if at > since}
        return {up for up in self._up if up in self._full or self._breaker.avoids(up)}

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
                self._loads.count(pair, len(self._on(pair)))
                if not self._rows[pair]:
                    del self._rows[pair]


# Serve makes a deployment's PairChooser itself, in the process of the router that it serves.
PAIRS = Pairs()
