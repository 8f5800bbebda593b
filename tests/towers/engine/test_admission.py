"""Who gets room in a pool: order, limits, cancellation."""

from __future__ import annotations

import asyncio
import random

import pytest
import torch

from tests.support.random_model import SMALL
from twotower.towers.engine.admission import Admission
from twotower.towers.errors import CapacityError, QueueFullError, UnavailableError
from twotower.towers.state.context_state import ContextState
from twotower.towers.state.pages import pages_for
from twotower.towers.state.pool import StatePool

PAGE = 64
Wait = asyncio.Task[ContextState]


def new_pool(slots: int = 4, pages: int = 4) -> StatePool:
    return StatePool(SMALL, slots, pages, torch.device("cpu"), torch.float32)


def start(admission: Admission, row_id: str, pages: int = 1) -> Wait:
    return asyncio.create_task(admission.acquire(row_id, pages * PAGE))


async def turn(wait: Wait) -> ContextState:
    """The result of a wait that must end."""
    async with asyncio.timeout(30):
        return await wait


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def assert_empty(admission: Admission, pool: StatePool) -> None:
    assert admission.rows == {}
    assert admission.num_waiting == 0
    assert pool.slots_used == pool.pages_used == 0


async def test_rows_enter_while_there_is_room() -> None:
    pool = new_pool()
    admission = Admission(pool)
    state = await admission.acquire("a", 100)
    assert state.capacity == 100
    assert admission.rows == {"a": state}
    other = await admission.acquire("b", 128)
    assert not set(other.pages) & set(state.pages)
    for row_id in ("a", "b", "b", "never there"):
        admission.release(row_id)
    assert_empty(admission, pool)


@pytest.mark.parametrize("scarce", ["slots", "pages"])
async def test_rows_wait_in_order_and_none_overtakes(scarce: str) -> None:
    pool = new_pool(slots=2 if scarce == "slots" else 9, pages=4 if scarce == "pages" else 99)
    admission = Admission(pool)
    await admission.acquire("a", 2 * PAGE)
    await admission.acquire("b", 2 * PAGE)
    waits = {row_id: start(admission, row_id, n) for row_id, n in (("c", 3), ("d", 1), ("e", 1))}
    await settle()
    assert admission.num_waiting == 3
    admission.release("a")
    await settle()
    # With two pages free c does not fit; d and e would, but came later.
    assert waits["c"].done() == (scarce == "slots")
    assert not waits["d"].done()
    admission.release("b")
    await settle()
    assert waits["c"].done()
    assert waits["d"].done()
    assert not waits["e"].done()
    admission.release("c")
    await settle()
    assert set(admission.rows) == {"d", "e"}
    admission.release("d")
    admission.release("e")
    assert_empty(admission, pool)


async def test_a_newcomer_does_not_overtake_the_queue() -> None:
    pool = new_pool()
    admission = Admission(pool)
    await admission.acquire("a", 2 * PAGE)
    wait = start(admission, "b", 3)
    await settle()
    small = start(admission, "c", 1)
    await settle()
    assert not small.done()
    assert pool.pages.num_free == 2
    admission.release("a")
    await turn(wait)
    await turn(small)


async def test_a_row_that_can_never_fit_is_refused_at_once() -> None:
    pool = new_pool(pages=4)
    admission = Admission(pool)
    with pytest.raises(
        CapacityError, match="got 257 tokens = 5 pages, expected at most 256 tokens = 4 pages"
    ) as caught:
        await admission.acquire("a", 257)
    assert not isinstance(caught.value, QueueFullError)
    assert_empty(admission, pool)


async def test_the_queue_has_a_limit() -> None:
    pool = new_pool()
    admission = Admission(pool, max_queued_requests=2)
    await admission.acquire("a", 4 * PAGE)
    waits = [start(admission, row_id) for row_id in ("b", "c")]
    await settle()
    with pytest.raises(QueueFullError, match="max_queued_requests = 2"):
        await admission.acquire("d", 1)
    # One place is free again.
    waits[0].cancel()
    await settle()
    waits.append(start(admission, "d"))
    await settle()
    assert admission.num_waiting == 2
    admission.release("a")
    for wait in waits[1:]:
        await turn(wait)


async def test_without_a_queue_rows_enter_or_are_refused() -> None:
    admission = Admission(new_pool(), max_queued_requests=0)
    await admission.acquire("a", 4 * PAGE)
    with pytest.raises(QueueFullError):
        await admission.acquire("b", 1)


async def test_a_row_is_opened_once() -> None:
    admission = Admission(new_pool())
    await admission.acquire("a", 4 * PAGE)
    wait = start(admission, "b")
    await settle()
    for row_id in ("a", "b"):
        with pytest.raises(ValueError, match=f"row_id: {row_id} is open already"):
            await admission.acquire(row_id, 1)
    wait.cancel()


async def test_a_release_ends_the_wait() -> None:
    pool = new_pool()
    admission = Admission(pool)
    await admission.acquire("a", 3 * PAGE)
    head, behind = start(admission, "b", 2), start(admission, "c", 1)
    await settle()
    admission.release("b")
    with pytest.raises(UnavailableError, match="the row was released"):
        await turn(head)
    # What waited behind it fits and enters.
    assert (await turn(behind)).capacity == PAGE
    admission.release("a")
    admission.release("c")
    assert_empty(admission, pool)


async def test_a_cancelled_wait_leaves_the_queue() -> None:
    pool = new_pool()
    admission = Admission(pool)
    await admission.acquire("a", 3 * PAGE)
    head, behind = start(admission, "b", 2), start(admission, "c", 1)
    await settle()
    head.cancel()
    with pytest.raises(asyncio.CancelledError):
        await turn(head)
    await turn(behind)
    assert admission.num_waiting == 0
    assert set(admission.rows) == {"a", "c"}


@pytest.mark.parametrize("end", ["cancel", "release"])
async def test_a_row_that_ends_between_its_turn_and_its_return_holds_nothing(end: str) -> None:
    pool = new_pool()
    admission = Admission(pool)
    await admission.acquire("a", 4 * PAGE)
    wait = start(admission, "b", 4)
    await settle()
    admission.release("a")
    assert "b" in admission.rows
    assert not wait.done()
    if end == "cancel":
        wait.cancel()
    else:
        admission.release("b")
    with pytest.raises(asyncio.CancelledError if end == "cancel" else UnavailableError):
        await turn(wait)
    assert_empty(admission, pool)


async def test_a_row_released_and_opened_again_gets_a_state_of_its_own() -> None:
    pool = new_pool()
    admission = Admission(pool)
    await admission.acquire("a", 4 * PAGE)
    wait = start(admission, "b", 4)
    await settle()
    admission.release("a")
    admission.release("b")
    again = start(admission, "b", 4)
    with pytest.raises(UnavailableError):
        await turn(wait)
    assert admission.rows["b"] is await turn(again)


async def test_pages_are_reclaimed_before_a_row_waits() -> None:
    pool = new_pool()
    cached = pool.pages.allocate(3)
    asked: list[int] = []

    def reclaim(pages: int) -> bool:
        asked.append(pages)
        if pages > len(cached):
            return False
        pool.pages.free([cached.pop() for _ in range(pages)])
        return True

    admission = Admission(pool, reclaim)
    await admission.acquire("a", PAGE)
    assert asked == []
    await admission.acquire("b", 2 * PAGE)
    assert asked == [2]
    wait = start(admission, "c", 2)
    await settle()
    assert asked == [2, 2]
    assert not wait.done()
    admission.release("a")
    await turn(wait)
    assert asked == [2, 2, 1]


async def test_without_a_slot_nothing_is_reclaimed() -> None:
    pool = new_pool(slots=1)
    cached = pool.pages.allocate(3)

    def reclaim(pages: int) -> bool:
        pool.pages.free(cached[:pages])
        return True

    admission = Admission(pool, reclaim)
    await admission.acquire("a", PAGE)
    wait = start(admission, "b", 2)
    await settle()
    assert pool.pages.num_free == 0
    admission.release("a")
    await turn(wait)


async def test_admit_lets_rows_in_after_pages_came_free() -> None:
    pool = new_pool()
    state = await Admission(pool).acquire("elsewhere", 4 * PAGE)
    admission = Admission(pool)
    wait = start(admission, "a")
    await settle()
    state.release()
    await settle()
    assert not wait.done()
    admission.admit()
    await turn(wait)


class Entries(dict[str, ContextState]):
    """Rows, and the order in which they came in."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[int] = []

    def __setitem__(self, row_id: str, state: ContextState) -> None:
        super().__setitem__(row_id, state)
        self.order.append(int(row_id))


@pytest.mark.parametrize("seed", range(4))
async def test_many_rows_that_end_at_any_moment(seed: int) -> None:
    draw, pool = random.Random(seed), new_pool(slots=5, pages=12)
    admission = Admission(pool, max_queued_requests=20)
    entered = admission.rows = Entries()

    async def row(number: int, pages: int, steps: int) -> None:
        try:
            state = await admission.acquire(f"{number}", pages * PAGE)
            assert len(state.pages) == pages
            for _ in range(steps):
                await asyncio.sleep(0)
        except (QueueFullError, UnavailableError):
            return
        finally:
            admission.release(f"{number}")

    rows: list[asyncio.Task[None]] = []
    for number in range(300):
        rows.append(asyncio.create_task(row(number, draw.randint(1, 8), draw.randint(0, 6))))
        if draw.random() < 0.2:
            draw.choice(rows).cancel()
        if draw.random() < 0.1:
            admission.release(f"{draw.randrange(number + 1)}")
        for _ in range(draw.randint(0, 4)):
            await asyncio.sleep(0)
        held = sum(pages_for(state.capacity) for state in admission.rows.values())
        assert pool.pages_used == held <= 12
        assert pool.slots_used == len(admission.rows) <= 5
    async with asyncio.timeout(60):
        await asyncio.gather(*rows, return_exceptions=True)
    assert len(entered.order) > 50
    assert entered.order == sorted(entered.order)
    assert_empty(admission, pool)
