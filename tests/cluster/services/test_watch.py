"""A process that does not answer: when it is left alone, and when it is ended."""

from __future__ import annotations

import asyncio

import pytest

from twotower.cluster.services.watch import CHANCES, Watch
from twotower.towers.errors import UnavailableError

TIMEOUT_S = 0.1


class Process:
    """Counts how often it was ended."""

    def __init__(self) -> None:
        self.ends = 0
        self.watch = Watch(self.end, TIMEOUT_S)

    def end(self) -> None:
        self.ends += 1

    async def ask(self, seconds: float) -> str:
        return await self.watch.answer(asyncio.sleep(seconds, "fine"))


async def test_an_answer_in_time() -> None:
    process = Process()
    assert await process.ask(0.0) == "fine"
    assert process.ends == 0


async def test_a_process_that_goes_on_answering_nothing_is_ended() -> None:
    process = Process()
    for asked in range(1, CHANCES + 1):
        with pytest.raises(UnavailableError, match="does not answer"):
            await process.ask(60.0)
        assert process.ends == (asked == CHANCES)


async def test_an_answer_between_two_silences_counts() -> None:
    process = Process()
    for _ in range(2 * CHANCES):
        with pytest.raises(UnavailableError):
            await process.ask(60.0)
        assert await process.ask(0.0) == "fine"
    assert process.ends == 0


async def test_questions_that_are_asked_together_are_one_silence() -> None:
    process = Process()
    found = await asyncio.gather(*(process.ask(60.0) for _ in range(10)), return_exceptions=True)
    assert {type(one) for one in found} == {UnavailableError}
    assert process.ends == 0


async def test_a_loss_is_no_silence() -> None:
    process = Process()

    async def lost() -> None:
        raise UnavailableError("the tower is gone")

    for _ in range(2 * CHANCES):
        with pytest.raises(UnavailableError, match="is gone"):
            await process.watch.answer(lost())
    assert process.ends == 0
