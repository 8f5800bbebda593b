"""The towers of one pair as the two services of a block loop: which denoiser has which row, and
what happens when one is lost.

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
from typing import Protocol, TypeVar

from twotower.cluster.services.watch import ANSWER_TIMEOUT_S
from twotower.towers.decoding.services import Block, ContextService, DenoiserService, Prefilled
from twotower.towers.errors import UnavailableError
from twotower.towers.request.params import GenerationParams

logger = logging.getLogger(__name__)

T = TypeVar("T")
# A row is moved so often within one call before its request has to find another pair.
MOST_MOVES = 3
# Repairs of one denoiser in a row that failed, after which the pair is replaced.
MOST_REPAIRS = 3


class ContextTowerService(ContextService, Protocol):
    """A context tower with links to several denoiser towers."""

    async def open_for(self, row_id: str, capacity: int, denoiser: int) -> int:
        """As `open`; the row's state will go to that denoiser tower."""

    async def move(self, row_id: str, denoiser: int) -> None:
        """Sends all of a row's state to a denoiser tower that has just opened the row, and every
        update from now on."""

    async def broken_links(self) -> list[int]:
        """Denoiser towers whose links do not work any more."""

    async def stats(self) -> dict[str, float]:
        """Counters of the tower's engine."""

    async def check(self) -> None:
        """Raises UnavailableError if the tower cannot serve."""


class DenoiserTowerService(DenoiserService, Protocol):
    """A denoiser tower that can be watched."""

    async def stats(self) -> dict[str, float]:
        """Counters of the tower's engine."""

    async def check(self) -> None:
        """Raises UnavailableError if the tower cannot serve."""


class DenoiserKeeper(Protocol):
    """Starts denoiser towers and joins them to the context tower."""

    async def start(self, index: int) -> DenoiserTowerService:
        """A denoiser tower in place `index`, linked; whatever was there before is ended first."""

    async def relink(self, index: int) -> None:
        """A new link to the tower in place `index`, which is alive."""


@dataclass(eq=False)
class _Seat:
    """A denoiser tower's place. `ready` is set while rows can use it."""

    index: int
    tower: DenoiserTowerService
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    repair: asyncio.Task[None] | None = None
    failures: int = 0
    rows: set[str] = field(default_factory=set)


@dataclass(eq=False)
class _Place:
    """Where a row is."""

    seat: _Seat
    capacity: int


class PairTowers:
    """Watches a pair's towers and knows where each row is."""

    def __init__(
        self,
        context: ContextTowerService,
        denoisers: Sequence[DenoiserTowerService],
        keeper: DenoiserKeeper,
        *,
        repair_timeout_s: float,
        answer_timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> None:
        self.tower = context
        self._keeper = keeper
        self._seats = [_Seat(index, tower) for index, tower in enumerate(denoisers)]
        for seat in self._seats:
            seat.ready.set()
        self._places: dict[str, _Place] = {}
        self._repair_timeout = repair_timeout_s
        self._answer_timeout = answer_timeout_s
        self._last_stats: dict[str, float] = {}
        self.context = AssignedContext(self)
        self.denoiser = AssignedDenoisers(self)

    def assign(self, row_id: str, capacity: int) -> int:
        """Chooses a denoiser for a row: one that works, with the fewest rows."""
        seat = self._best_seat()
        seat.rows.add(row_id)
        self._places[row_id] = _Place(seat, capacity)
        return seat.index

    def drop(self, row_id: str) -> None:
        """Forgets a row."""
        place = self._places.pop(row_id, None)
        if place is not None:
            place.seat.rows.discard(row_id)

    def tower_of(self, row_id: str) -> DenoiserTowerService:
        """The denoiser that has a row. Raises UnavailableError for an unknown one."""
        return self._place(row_id).seat.tower

    async def on_denoiser(
        self, row_id: str, call: Callable[[DenoiserTowerService], Awaitable[T]]
    ) -> T:
        """A row's call of its denoiser, made again where the row has been moved to."""
        for moves in range(MOST_MOVES + 1):
            try:
                if moves:
                    await self._move(row_id)
                return await call(self._place(row_id).seat.tower)
            except UnavailableError:
                if moves == MOST_MOVES or row_id not in self._places:
                    raise
        raise AssertionError("every turn returns or raises")

    async def check(self) -> None:
        """Looks after the denoisers; repairs run in the background.

        Raises UnavailableError if one cannot be brought back.
        """
        broken = set(await self.tower.broken_links())
        await asyncio.gather(
            *(self._look_after(seat, seat.index in broken) for seat in self._seats)
        )
        for seat in self._seats:
            if seat.failures >= MOST_REPAIRS:
                raise UnavailableError(f"denoiser tower {seat.index} does not come back")

    async def stats(self) -> dict[str, float]:
        """The denoisers' counters: sums, and means of what is a time or a share; while all are
        away, the last that were known."""
        ready = [seat.tower for seat in self._seats if seat.ready.is_set()]
        answers = await asyncio.gather(
            *(asyncio.wait_for(tower.stats(), self._answer_timeout) for tower in ready),
            return_exceptions=True,
        )
        known = [answer for answer in answers if isinstance(answer, dict)]
        if not known:
            return self._last_stats
        summed = {name: sum(one.get(name, 0.0) for one in known) for name in known[0]}
        for name in ("clock_seconds", "pass_seconds", "busy_share"):
            summed[name] /= len(known)
        self._last_stats = summed
        return summed

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
                await self._keeper.relink(seat.index)
                # Rows that wait for an update that was lost would wait long: they come again.
                lost = [seat.tower.release(row_id) for row_id in list(seat.rows)]
                await asyncio.gather(*lost, return_exceptions=True)
            else:
                async with asyncio.timeout(self._repair_timeout):
                    seat.tower = await self._keeper.start(seat.index)
        except (UnavailableError, TimeoutError) as error:
            seat.failures += 1
            logger.warning("denoiser tower %d is not back: %s", seat.index, error or "too slow")
            return
        seat.ready.set()

    async def _move(self, row_id: str) -> None:
        """Opens a row anew on a denoiser that works, its own if need be once that is back."""
        place = self._place(row_id)
        if place.seat.ready.is_set():
            # Nobody has noticed yet, or only this row was concerned.
            await self._look_after(place.seat, place.seat.index in await self.tower.broken_links())
        seat = await self._working_seat()
        place = self._place(row_id)
        # A tower that is gone has nothing to release.
        await asyncio.gather(place.seat.tower.release(row_id), return_exceptions=True)
        # Before the row is opened there: whatever happens then, it is released there too.
        place.seat.rows.discard(row_id)
        place.seat = seat
        seat.rows.add(row_id)
        await seat.tower.open(row_id, place.capacity)
        await self.tower.move(row_id, seat.index)

    async def _working_seat(self) -> _Seat:
        """The best seat, once there is one that works."""
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

    def _place(self, row_id: str) -> _Place:
        place = self._places.get(row_id)
        if place is None:
            raise UnavailableError("the row was released")
        return place


class AssignedContext:
    """The context tower of a pair; fulfils `ContextService` and can be watched."""

    def __init__(self, pair: PairTowers) -> None:
        self._pair = pair

    async def open(self, row_id: str, capacity: int) -> int:
        index = self._pair.assign(row_id, capacity)
        try:
            return await self._pair.tower.open_for(row_id, capacity, index)
        except BaseException:
            self._pair.drop(row_id)
            raise

    async def prefill(
        self, row_id: str, prompt: Sequence[int], generated: Sequence[int], params: GenerationParams
    ) -> Prefilled:
        return await self._pair.tower.prefill(row_id, prompt, generated, params)

    async def extend(self, row_id: str, token_ids: Sequence[int]) -> int:
        return await self._pair.tower.extend(row_id, token_ids)

    async def decode(self, row_id: str, count: int, params: GenerationParams) -> Block:
        return await self._pair.tower.decode(row_id, count, params)

    async def verify(self, row_id: str, draft: Sequence[int], params: GenerationParams) -> Block:
        return await self._pair.tower.verify(row_id, draft, params)

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        return await self._pair.tower.score(token_ids)

    async def release(self, row_id: str) -> None:
        try:
            await self._pair.tower.release(row_id)
        finally:
            self._pair.drop(row_id)

    async def stats(self) -> dict[str, float]:
        """Counters of the tower's engine."""
        return await self._pair.tower.stats()

    async def check(self) -> None:
        """Raises UnavailableError if the tower cannot serve: then the pair cannot."""
        await self._pair.tower.check()


class AssignedDenoisers:
    """All denoiser towers of a pair as one; fulfils `DenoiserService` and can be watched."""

    def __init__(self, pair: PairTowers) -> None:
        self._pair = pair

    async def open(self, row_id: str, capacity: int) -> None:
        tower = self._pair.tower_of(row_id)
        try:
            await tower.open(row_id, capacity)
        except UnavailableError:
            # The tower was lost before the row reached it: its first block finds out and moves it.
            logger.info("row %s is opened by its first block", row_id)

    async def denoise_block(
        self,
        row_id: str,
        position: int,
        params: GenerationParams,
        known: Sequence[int] = (),
    ) -> Block:
        return await self._pair.on_denoiser(
            row_id, lambda tower: tower.denoise_block(row_id, position, params, known)
        )

    async def next_token(
        self, row_id: str, position: int, last_token: int, params: GenerationParams
    ) -> Block:
        return await self._pair.on_denoiser(
            row_id, lambda tower: tower.next_token(row_id, position, last_token, params)
        )

    async def release(self, row_id: str) -> None:
        try:
            tower = self._pair.tower_of(row_id)
        except UnavailableError:
            return
        # A tower that is gone has nothing to release.
        await asyncio.gather(tower.release(row_id), return_exceptions=True)

    async def stats(self) -> dict[str, float]:
        """Counters of all towers together."""
        return await self._pair.stats()

    async def check(self) -> None:
        """Looks after the towers. Raises UnavailableError if one cannot be brought back."""
        await self._pair.check()
