"""Places for requests: halved by a refusal, one more per window of answers, never lost."""

from __future__ import annotations

import asyncio

from twotower.data.places import Places


async def test_no_more_are_taken_than_there_are() -> None:
    places = Places(2)
    assert [await places.take(), await places.take()] == [0, 0]
    third = asyncio.create_task(places.take())
    await asyncio.sleep(0)
    assert not third.done()
    places.give_back()
    assert await third == 0
    assert places.taken == 2


async def test_a_round_of_refusals_halves_once() -> None:
    places = Places(16)
    rounds = [await places.take() for _ in range(16)]
    for of_round in rounds:
        places.refused(of_round)
    assert places.limit == 8
    for _ in range(16):
        places.give_back()
    for expected in (4, 2, 1, 1):
        places.refused(await places.take())
        places.give_back()
        assert places.limit == expected


async def test_as_many_answers_as_places_give_one_more() -> None:
    places = Places(4)
    places.refused(await places.take())
    places.give_back()
    limits = []
    for _ in range(8):
        places.answered()
        limits.append(places.limit)
    # 2 answers with 2 places, 3 with 3, and no more than there were.
    assert limits == [2, 3, 3, 3, 4, 4, 4, 4]


async def test_those_that_try_again_come_first() -> None:
    places = Places(1)
    await places.take()
    order: list[str] = []

    async def wait(name: str, first: bool) -> None:
        await places.take(first=first)
        order.append(name)
        places.give_back()

    tasks = [asyncio.create_task(wait(name, name == "again")) for name in ("a", "b", "again")]
    await asyncio.sleep(0)
    places.give_back()
    await asyncio.gather(*tasks)
    assert order == ["again", "a", "b"]


async def test_a_place_is_not_lost_with_who_waited_for_it() -> None:
    places = Places(1)
    await places.take()
    waiting = asyncio.create_task(places.take())
    given = asyncio.create_task(places.take())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.sleep(0)
    places.give_back()
    # Cancelled in the moment in which the place is its own.
    given.cancel()
    await asyncio.gather(waiting, given, return_exceptions=True)
    assert given.cancelled()
    assert places.taken == 0
    assert await asyncio.wait_for(places.take(), 1.0) == 0
