"""Waits for a pair's answers: what ends them, and what does not."""

from __future__ import annotations

import asyncio

import pytest

from twotower.deployments.routing import patience as module
from twotower.deployments.routing.patience import Patience
from twotower.towers.errors import UnavailableError

LOOK_S = 0.01
PERIOD_S = 0.06


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_S", LOOK_S)


class Checks:
    """Counts looks and checks, each of which raises if it is told to."""

    def __init__(self) -> None:
        self.looks = self.checks = 0
        self.look_error: Exception | None = None
        self.check_error: Exception | None = None
        self.check_s = 0.0

    def look(self) -> None:
        self.looks += 1
        if self.look_error is not None:
            raise self.look_error

    async def check(self) -> None:
        self.checks += 1
        await asyncio.sleep(self.check_s)
        if self.check_error is not None:
            raise self.check_error

    def patience(self) -> Patience:
        return Patience(self.check, PERIOD_S, self.look)


async def after(seconds: float, value: str = "answer") -> str:
    await asyncio.sleep(seconds)
    return value


async def never() -> str:
    await asyncio.Event().wait()
    raise AssertionError


async def test_an_answer_in_time_is_given_without_a_look() -> None:
    checks = Checks()
    with checks.patience() as patience:
        for _ in range(3):
            assert await patience.wait(after(0)) == "answer"
    await asyncio.sleep(3 * LOOK_S)
    assert (checks.looks, checks.checks) == (0, 0)


async def test_a_long_wait_is_looked_at_and_checked_from_time_to_time() -> None:
    checks = Checks()
    with checks.patience() as patience:
        assert await patience.wait(after(3.5 * PERIOD_S)) == "answer"
    assert checks.looks >= 5
    assert 1 <= checks.checks <= 3


async def test_what_a_look_raises_ends_the_wait() -> None:
    checks = Checks()
    checks.look_error = KeyError("moved")
    with checks.patience() as patience, pytest.raises(KeyError, match="moved"):
        await patience.wait(never())


async def test_what_a_check_raises_ends_the_wait_but_not_before_its_time() -> None:
    checks = Checks()
    checks.check_error = UnavailableError("no pair")
    begin = asyncio.get_running_loop().time()
    with checks.patience() as patience, pytest.raises(UnavailableError, match="no pair"):
        await patience.wait(never())
    assert asyncio.get_running_loop().time() - begin >= PERIOD_S


async def test_short_waits_one_after_another_are_no_long_one() -> None:
    checks = Checks()
    checks.check_error = UnavailableError("no pair")
    with checks.patience() as patience:
        for _ in range(6):
            assert await patience.wait(after(PERIOD_S / 3)) == "answer"


async def test_a_check_that_fails_after_the_answer_ends_no_later_wait() -> None:
    checks = Checks()
    checks.check_s = 2 * PERIOD_S
    checks.check_error = UnavailableError("no pair")
    with checks.patience() as patience:
        # Its check is still under way when the answer comes.
        assert await patience.wait(after(PERIOD_S + 3 * LOOK_S)) == "answer"
        assert checks.checks == 1
        assert await patience.wait(after(2 * PERIOD_S, "next")) == "next"


async def test_what_has_ended_a_wait_stands_though_the_answer_came_with_it() -> None:
    """A move has been noted before it is raised: the row must not go on where it was."""
    checks = Checks()
    answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def look() -> None:
        answer.set_result("answer")
        raise KeyError("moved")

    with Patience(checks.check, PERIOD_S, look) as patience:
        with pytest.raises(KeyError, match="moved"):
            await patience.wait(answer)
        assert await patience.wait(after(0, "next")) == "next"


async def test_an_answers_own_timeout_stays_one() -> None:
    async def slow() -> str:
        raise TimeoutError("the pair's own")

    with Checks().patience() as patience, pytest.raises(TimeoutError, match="the pair's own"):
        await patience.wait(slow())


async def test_a_cancelled_wait_is_cancelled() -> None:
    async def waiting() -> None:
        with Checks().patience() as patience:
            await patience.wait(never())

    task = asyncio.ensure_future(waiting())
    await asyncio.sleep(2 * LOOK_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_nothing_is_left_running() -> None:
    checks = Checks()
    checks.check_s = 60.0
    with checks.patience() as patience:
        await patience.wait(after(PERIOD_S + 3 * LOOK_S))
    looks = checks.looks
    await asyncio.sleep(3 * LOOK_S)
    assert checks.looks == looks
    assert len(asyncio.all_tasks()) == 1
