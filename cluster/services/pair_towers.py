"""The towers of a pair as the two services of a block loop, with repair of lost denoisers.

A denoiser tower holds nothing that the context tower does not have. So a denoiser that died or
hangs is started anew in its place, or a broken link is joined again; its rows are opened again,
there or on a denoiser with room, and their states sent whole. A row's block that was lost with it
is denoised again: same state, same noise, same tokens. A lost context tower ends the pair.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from twotower.cluster.services.tower_services import (
    Call,
    ContextTowerService,
    DenoiserTowerService,
    P,
    bound,
)
from twotower.cluster.services.watch import ANSWER_TIMEOUT_S
from twotower.towers.engine.stats import EngineStats
from twotower.towers.errors import UnavailableError

logger = logging.getLogger(__name__)

T = TypeVar("T")
# Moves of a row within a call, after which its request has to find another pair.
MOST_MOVES = 3
# Repairs of one denoiser in a row that failed, after which the pair is replaced.
MOST_REPAIRS = 3


@dataclass(eq=False)
class _Seat:
    """A denoiser tower's place. `ready` is set while rows can use it; `rows` are those that it
    has, with their capacities."""

    index: int
    tower: DenoiserTowerService
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    repair: asyncio.Task[None] | None = None
    failures: int = 0
    rows: dict[str, int] = field(default_factory=dict)


class PairTowers:
    """Watches a pair's towers and knows which denoiser has which row.

    `start(index)` gives a new denoiser tower in place `index`, linked, and ends the one before it;
    `relink(index)` gives the tower there, which is alive, a new link.
    """

    def __init__(
        self,
        context: ContextTowerService,
        denoisers: Sequence[DenoiserTowerService],
        start: Callable[[int], Awaitable[DenoiserTowerService]],
        relink: Callable[[int], Awaitable[None]],
        *,
        repair_timeout_s: float,
        answer_timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> None:
        self.tower = context
        self._start = start
        self._relink = relink
        self._seats = [_Seat(index, tower) for index, tower in enumerate(denoisers)]
        for seat in self._seats:
            seat.ready.set()
        self._seat_of: dict[str, _Seat] = {}
        self._repair_timeout = repair_timeout_s
        self._answer_timeout = answer_timeout_s
        self._last_stats: EngineStats | None = None
        self._releasing: set[asyncio.Future[Any]] = set()
        self.context: ContextTowerService = _AssignedContext(self)
        self.denoiser: DenoiserTowerService = _AssignedDenoisers(self)

    def assign(self, row_id: str, capacity: int) -> int:
        """Chooses a denoiser for a row: of those that work the one with the fewest rows."""
        seat = self._best_seat()
        seat.rows[row_id] = capacity
        self._seat_of[row_id] = seat
        return seat.index

    def drop(self, row_id: str) -> None:
        """Takes a row off its denoiser."""
        seat = self._seat_of.pop(row_id, None)
        if seat is not None:
            seat.rows.pop(row_id, None)

    def tower_of(self, row_id: str) -> DenoiserTowerService:
        """The denoiser that has a row. Raises UnavailableError for an unknown row."""
        return self._seat(row_id).tower

    async def on_denoiser(
        self, row_id: str, call: Callable[[DenoiserTowerService], Awaitable[T]]
    ) -> T:
        """A row's call of its denoiser, made again where the row has been moved to."""
        for moves in range(MOST_MOVES + 1):
            try:
                if moves:
                    await self._move(row_id)
                return await call(self._seat(row_id).tower)
            except UnavailableError:
                if moves == MOST_MOVES or row_id not in self._seat_of:
                    raise
        raise AssertionError("every turn returns or raises")

    async def check(self) -> None:
        """Looks after the denoisers; repairs run in the background.

        Raises UnavailableError if a denoiser cannot be brought back.
        """
        broken = set(await self.tower.broken_links())
        await asyncio.gather(
            *(self._look_after(seat, seat.index in broken) for seat in self._seats)
        )
        for seat in self._seats:
            if seat.failures >= MOST_REPAIRS:
                raise UnavailableError(f"denoiser tower {seat.index} does not come back")

    async def stats(self) -> EngineStats:
        """The counters of all denoisers together; while all are away, the last that were known.

        Raises UnavailableError if none has ever said.
        """
        ready = [seat.tower for seat in self._seats if seat.ready.is_set()]
        answers = await asyncio.gather(
            *(asyncio.wait_for(tower.stats(), self._answer_timeout) for tower in ready),
            return_exceptions=True,
        )
        known = [answer for answer in answers if isinstance(answer, EngineStats)]
        if known:
            self._last_stats = EngineStats.merged(known)
        if self._last_stats is None:
            raise UnavailableError("no denoiser tower answers; try again")
        return self._last_stats

    async def _look_after(self, seat: _Seat, link_broken: bool) -> None:
        if seat.repair is not None and not seat.repair.done():
            return
        alive = await self._alive(seat)
        if alive and not link_broken:
            seat.failures = 0
        else:
            self._begin_repair(seat, alive)

    async def _alive(self, seat: _Seat) -> bool:
        try:
            async with asyncio.timeout(self._answer_timeout):
                await seat.tower.check()
        except (UnavailableError, TimeoutError) as error:
            logger.warning("denoiser tower %d: %s", seat.index, error or "does not answer")
            return False
        return True

    def _begin_repair(self, seat: _Seat, alive: bool) -> None:
        if seat.repair is None or seat.repair.done():
            seat.ready.clear()
            seat.repair = asyncio.create_task(self._repair(seat, alive))

    async def _repair(self, seat: _Seat, alive: bool) -> None:
        """Joins the link again if the tower is alive, otherwise starts a tower in its place."""
        try:
            if alive:
                await self._relink(seat.index)
                # Rows that wait for an update that was lost would wait long: they come again.
                lost = [seat.tower.release(row_id) for row_id in list(seat.rows)]
                await asyncio.gather(*lost, return_exceptions=True)
            else:
                async with asyncio.timeout(self._repair_timeout):
                    seat.tower = await self._start(seat.index)
        except (UnavailableError, TimeoutError) as error:
            seat.failures += 1
            logger.warning("denoiser tower %d is not back: %s", seat.index, error or "too slow")
            return
        seat.ready.set()

    async def _move(self, row_id: str) -> None:
        """Opens a row anew on a denoiser that works, if need be the same one once that is back."""
        seat = self._seat(row_id)
        if seat.ready.is_set():
            # The loss was not noticed yet, or only this row is concerned.
            await self._look_after(seat, seat.index in await self.tower.broken_links())
        seat = await self._working_seat()
        before = self._seat(row_id).tower
        # A tower that is gone has nothing to release, and may take long to say so.
        released = asyncio.gather(before.release(row_id), return_exceptions=True)
        self._releasing.add(released)
        released.add_done_callback(self._releasing.discard)
        if before is seat.tower:
            await released
        # Before the row is opened there: whatever happens then, it is released there too.
        capacity = self._seat(row_id).rows.pop(row_id)
        seat.rows[row_id] = capacity
        self._seat_of[row_id] = seat
        await seat.tower.open(row_id, capacity)
        await self.tower.move(row_id, seat.index)

    async def _working_seat(self) -> _Seat:
        """The best of the seats whose tower works, once there are any."""
        ready = [asyncio.create_task(seat.ready.wait()) for seat in self._seats]
        try:
            done, _ = await asyncio.wait(
                ready, timeout=self._repair_timeout, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            for task in ready:
                task.cancel()
        if not done:
            raise UnavailableError("no denoiser tower of the pair came back in time")
        return self._best_seat()

    def _best_seat(self) -> _Seat:
        return min(self._seats, key=lambda seat: (not seat.ready.is_set(), len(seat.rows)))

    def _seat(self, row_id: str) -> _Seat:
        seat = self._seat_of.get(row_id)
        if seat is None:
            raise UnavailableError("the row was released")
        return seat


class _AssignedContext(ContextTowerService):
    """The context tower of a pair; each row that opens is assigned to a denoiser tower."""

    def __init__(self, pair: PairTowers) -> None:
        self._pair = pair

    async def open(self, row_id: str, capacity: int) -> int:
        index = self._pair.assign(row_id, capacity)
        try:
            return await self.open_for(row_id, capacity, index)
        except BaseException:
            self._pair.drop(row_id)
            raise

    async def release(self, row_id: str) -> None:
        try:
            await super().release(row_id)
        finally:
            self._pair.drop(row_id)

    async def _call(self, call: Call[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await bound(self._pair.tower, call)(*args, **kwargs)


class _AssignedDenoisers(DenoiserTowerService):
    """All denoiser towers of a pair as one; a row's call goes to the tower that has the row."""

    def __init__(self, pair: PairTowers) -> None:
        self._pair = pair

    async def open(self, row_id: str, capacity: int) -> None:
        tower = self._pair.tower_of(row_id)
        try:
            await tower.open(row_id, capacity)
        except UnavailableError:
            # The tower was lost before the row reached it: its first block finds out and moves it.
            logger.info("row %s is opened by its first block", row_id)

    async def release(self, row_id: str) -> None:
        try:
            tower = self._pair.tower_of(row_id)
        except UnavailableError:
            return
        # A tower that is gone has nothing to release.
        await asyncio.gather(tower.release(row_id), return_exceptions=True)

    async def stats(self) -> EngineStats:
        """Counters of all towers together."""
        return await self._pair.stats()

    async def check(self) -> None:
        """Looks after the towers. Raises UnavailableError if a tower cannot be brought back."""
        await self._pair.check()

    async def _call(self, call: Call[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        # Calls that are not made here begin with the row.
        row_id = str(args[0])
        return await self._pair.on_denoiser(
            row_id, lambda tower: bound(tower, call)(*args, **kwargs)
        )
