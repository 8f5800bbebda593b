"""A router in simulated time: the attempts of its requests, with the service's table and rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

from benchmarks.fleet.agenda import Agenda
from benchmarks.fleet.choosers import ServiceChooser
from benchmarks.fleet.load import Request
from benchmarks.fleet.pairs import Row, SimulatedPair
from twotower.deployments.routing.pairs import Pairs
from twotower.deployments.routing.patience import LOOK_S
from twotower.deployments.routing.policy import Room
from twotower.deployments.routing.retry import BrokenPairError, Losses, RetryPolicy
from twotower.towers.errors import TwoTowerError, UnavailableError

RETRY = RetryPolicy(resume_timeout_s=60.0, max_attempts=8)
# Serve's wait between two tries to find a pair with room.
NO_ROOM_S = 0.5


@dataclass(eq=False)
class Attempt:
    """A request's attempt: its name, and where it is, once it is somewhere."""

    request: Request
    losses: Losses
    row_id: str
    pair: SimulatedPair | None = None
    row: Row | None = None
    begun: bool = False
    over: bool = False


class SimulatedRouter:
    """Requests of some clients. `done` is told of each that ends, `failed` of each that the service
    gives up, `cut` of each whose router has gone."""

    def __init__(
        self,
        number: int,
        agenda: Agenda,
        table: Pairs,
        chooser: ServiceChooser,
        room: Room,
        done: Callable[[Request], None],
        failed: Callable[[Request, TwoTowerError], None],
        cut: Callable[[Request], None],
        prompt: Callable[[Request], tuple[int, ...]],
    ) -> None:
        self.number, self.up = number, True
        self.moves = self.unrouted = self.reissues = 0
        # Seconds without a block of requests that went on elsewhere.
        self.pauses: list[float] = []
        self.chooser, self._table, self._room = chooser, table, room
        self._agenda, self._prompt = agenda, prompt
        self._done, self._failed, self._cut = done, failed, cut
        self._names = count()
        self.attempts: dict[Attempt, None] = {}

    def take(self, request: Request) -> None:
        """A request of a client, or one that a client resumes."""
        self._attempt(request, Losses(RETRY, self._agenda.clock))

    def die(self) -> None:
        """Its process ends: pairs drop its rows."""
        self.up = False
        attempts = list(self.attempts)
        self.attempts.clear()
        for attempt in attempts:
            attempt.over = True
            attempt.request.silent_since = self._agenda.now
            if attempt.pair is not None and attempt.row is not None:
                attempt.pair.commit(attempt.row)
                attempt.pair.drop(attempt.row)
            self._cut(attempt.request)

    def _attempt(self, request: Request, losses: Losses, row_id: str | None = None) -> None:
        attempt = Attempt(request, losses, row_id or f"{self.number}-{next(self._names)}")
        self.attempts[attempt] = None
        self._table.opened(attempt.row_id)
        self._route(attempt)

    def _route(self, attempt: Attempt) -> None:
        if attempt.over:
            return
        pair = self.chooser.choose(attempt.row_id, self._prompt(attempt.request))
        if pair is None:
            self.unrouted += 1
            self._agenda.after(NO_ROOM_S, lambda: self._route(attempt))
            return
        attempt.pair = pair
        attempt.row = Row(
            attempt.request,
            lambda: self._first_block(attempt),
            lambda: self._ended(attempt),
            lambda: self._lost(attempt),
        )
        pair.take(attempt.row)
        self._agenda.after(LOOK_S, lambda: self._look(attempt))

    def _first_block(self, attempt: Attempt) -> None:
        attempt.begun = True
        if attempt.request.silent_since is not None:
            self.pauses.append(self._agenda.now - attempt.request.silent_since)
            attempt.request.silent_since = None
        self._table.worked(attempt.row_id)
        attempt.losses.forget()

    def _ended(self, attempt: Attempt) -> None:
        self._table.worked(attempt.row_id)
        self._leave(attempt)
        self._done(attempt.request)

    def _lost(self, attempt: Attempt) -> None:
        """The pair has gone with the attempt; the request goes on elsewhere after a pause."""
        expected = self._table.lost(attempt.row_id)
        self._leave(attempt)
        request, pair = attempt.request, attempt.pair
        assert pair is not None
        request.reissues += 1
        self.reissues += 1
        if request.silent_since is None:
            request.silent_since = pair.silent_since
        error = (BrokenPairError if expected else UnavailableError)("the pair is gone")
        try:
            pause = attempt.losses.wait_s(error)
        except TwoTowerError as refusal:
            self._failed(request, refusal)
            return
        self._agenda.after(pause, lambda: self._again(attempt))

    def _again(self, before: Attempt) -> None:
        if self.up:
            self._attempt(before.request, before.losses)
        else:
            self._cut(before.request)

    def _look(self, attempt: Attempt) -> None:
        """A row without a block moves to a pair that has room."""
        if attempt.begun or attempt.over or attempt.pair is None or attempt.row is None:
            return
        following = f"{self.number}-{next(self._names)}"
        if not self._table.moved(attempt.row_id, following, self._room):
            self._agenda.after(LOOK_S, lambda: self._look(attempt))
            return
        self.moves += 1
        attempt.pair.drop(attempt.row)
        self._leave(attempt)
        attempt.losses.queued()
        self._attempt(attempt.request, attempt.losses, following)

    def _leave(self, attempt: Attempt) -> None:
        attempt.over = True
        del self.attempts[attempt]
        self._table.ended(attempt.row_id)
        if attempt.pair is not None:
            self.chooser.ended(attempt.pair)
