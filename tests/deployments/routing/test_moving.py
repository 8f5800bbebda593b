"""Requests that wait in one pair while others have room, over pairs with a number of places."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from tests.deployments.routing.test_attempts import BLOCKS, JOB, OUTPUT, PROMPT, Stream, all_of
from twotower.deployments.pair.tower_pair import Job
from twotower.deployments.routing import patience as module
from twotower.deployments.routing import retry
from twotower.deployments.routing.attempts import Attempts, PairClient
from twotower.deployments.routing.pairs import Pairs
from twotower.deployments.routing.policy import Room
from twotower.deployments.routing.retry import RetryPolicy
from twotower.towers.decoding.commit_log import CommitLog
from twotower.towers.decoding.services import Block
from twotower.towers.errors import QueueFullError, UnavailableError

ROOM = 2
LOOK_S = 0.02
# Longer than many looks: a row in its prefill has time to be moved.
PREFILL_S = 0.2


class Places:
    """A pair that works on `ROOM` rows at once, which others wait for in order."""

    def __init__(self) -> None:
        self.room = asyncio.Semaphore(ROOM)
        self.inside: set[str] = set()
        self.read: list[int] = []
        self.interrupted: list[int] = []
        self.most = 0
        self.failures: list[Exception] = []

    async def generate(self, job: Job) -> AsyncIterator[Block]:
        self.inside.add(job.row_id)
        self.most = max(self.most, len(self.inside))
        try:
            if self.failures:
                raise self.failures.pop(0)
            async with self.room:
                self.read.append(job.prompt[0])
                try:
                    await asyncio.sleep(PREFILL_S)
                    async for block in all_of(job):
                        yield block
                except BaseException:
                    self.interrupted.append(job.prompt[0])
                    raise
        finally:
            self.inside.remove(job.row_id)


class Service:
    """A handle of pairs by name: a row goes where it is sent, any other to the first pair."""

    def __init__(self, pairs: Pairs, *names: str) -> None:
        self.pairs = pairs
        self.places: dict[str, Places] = {}
        self.jobs: list[Job] = []
        self.streams: list[Stream] = []
        self.generate = self.ping = self
        self.start(*names)

    def start(self, *names: str) -> None:
        """More pairs come up."""
        self.places.update({name: Places() for name in names})
        self.pairs.present(list(self.places))

    def options(self, **_: object) -> Service:
        return self

    def remote(self, *arguments: Any) -> Any:
        if not arguments:
            return asyncio.sleep(0)
        job: Job = arguments[0]
        self.jobs.append(job)
        name = self.pairs.target_of(job.row_id) or next(iter(self.places))
        self.pairs.routed(job.row_id, name)
        self.streams.append(Stream(self.places[name].generate(job)))
        return self.streams[-1]


@pytest.fixture(autouse=True)
def pairs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pairs]:
    monkeypatch.setattr(module, "LOOK_S", LOOK_S)
    monkeypatch.setattr(retry, "backoff_s", lambda _: 0.001)
    found = Pairs()
    monkeypatch.setattr("twotower.deployments.routing.pairs.PAIRS", found)
    yield found
    assert found.rows() == {}, "attempts are followed that have ended"


def start(service: Service, count: int, policy: RetryPolicy | None = None) -> list[Any]:
    """So many requests at once, known by the first token of their prompts."""
    attempts = Attempts(
        PairClient(service), policy or RetryPolicy(20, max_attempts=1), Room(ROOM, ROOM)
    )

    async def tokens(number: int) -> tuple[int, ...]:
        prompt = (number, *PROMPT[1:])
        log = CommitLog(len(prompt), ())
        async for block in attempts.blocks(Job(f"first-{number}", prompt, (), JOB.params), log):
            # Refuses a gap, and what is there already would not count.
            assert log.append(block)
        assert log.num_blocks == BLOCKS
        return log.token_ids

    return [asyncio.create_task(tokens(number)) for number in range(count)]


async def test_rows_that_wait_go_to_pairs_that_come_up(pairs: Pairs) -> None:
    service = Service(pairs, "old")
    requests = start(service, 12)
    await asyncio.sleep(2 * LOOK_S)
    service.start("new", "newer")
    assert await asyncio.gather(*requests) == [OUTPUT] * 12
    old, new, newer = service.places.values()
    # Read once each, by whomever.
    assert sorted(old.read + new.read + newer.read) == list(range(12))
    assert old.read[:2] == [0, 1]
    # Of those that waited the oldest went, and no pair got more than it works on.
    assert sorted(new.read[:2] + newer.read[:2]) == [2, 3, 4, 5]
    assert max(new.most, newer.most) == ROOM
    assert [pair.interrupted for pair in service.places.values()] == [[], [], []]


async def test_a_row_in_its_prefill_or_later_is_not_moved(pairs: Pairs) -> None:
    """Also when the pair beside it is idle, and while others wait behind it and leave."""
    service = Service(pairs, "old", "idle")
    assert await asyncio.gather(*start(service, ROOM)) == [OUTPUT] * ROOM
    assert (service.places["old"].read, service.places["idle"].read) == ([0, 1], [])
    assert await asyncio.gather(*start(service, 3 * ROOM)) == [OUTPUT] * 3 * ROOM
    assert [pair.interrupted for pair in service.places.values()] == [[], []]


async def test_a_move_has_a_name_of_its_own_and_is_no_loss(pairs: Pairs) -> None:
    """One loss would end a request here, and a resume timeout that had begun would have passed."""
    service = Service(pairs, "old", "new")
    requests = start(service, 2 * ROOM, RetryPolicy(0.0, max_attempts=1))
    assert await asyncio.gather(*requests) == [OUTPUT] * 2 * ROOM
    assert len({job.row_id for job in service.jobs}) == len(service.jobs) == 3 * ROOM
    assert {job.generated for job in service.jobs} == {()}
    assert {job.params for job in service.jobs} == {JOB.params}


async def test_a_moved_row_is_lost_like_any_other(pairs: Pairs) -> None:
    service = Service(pairs, "old", "new")
    service.places["new"].failures = [UnavailableError("a tower is gone")]
    requests = start(service, 2 * ROOM, RetryPolicy(20, max_attempts=2))
    assert await asyncio.gather(*requests) == [OUTPUT] * 2 * ROOM
    service.places["new"].failures = [UnavailableError("a tower is gone")] * 10
    requests = start(service, ROOM + 1, RetryPolicy(20, max_attempts=1))
    found = await asyncio.gather(*requests, return_exceptions=True)
    assert found[:ROOM] == [OUTPUT] * ROOM
    assert type(found[ROOM]) is retry.LostTooOftenError


async def test_a_moved_row_is_not_refused(pairs: Pairs) -> None:
    """Others have filled the pair meanwhile: it has been admitted once, so it waits again."""
    service = Service(pairs, "old", "full")
    service.places["full"].failures = [QueueFullError("queue: 3 rows wait")] * 3
    assert await asyncio.gather(*start(service, 3 * ROOM)) == [OUTPUT] * 3 * ROOM
    assert service.places["full"].failures == []
    service.places["old"].failures = [QueueFullError("queue: 3 rows wait")]
    with pytest.raises(QueueFullError):
        await start(service, 1)[0]


async def test_a_moved_row_that_finds_no_place_in_time_is_told_so(pairs: Pairs) -> None:
    service = Service(pairs, "old", "full")
    service.places["full"].failures = [QueueFullError("queue: 3 rows wait")] * 10
    requests = start(service, ROOM + 1, RetryPolicy(0.0, max_attempts=8))
    found = await asyncio.gather(*requests, return_exceptions=True)
    assert isinstance(found[ROOM], UnavailableError)
    assert "no pair of towers has room" in str(found[ROOM])


async def test_a_pair_that_loses_what_it_gets_is_no_target(pairs: Pairs) -> None:
    service = Service(pairs, "old", "broken")
    for number in range(2):
        pairs.opened(f"lost-{number}")
        pairs.routed(f"lost-{number}", "broken")
        pairs.lost(f"lost-{number}")
        pairs.ended(f"lost-{number}")
    assert await asyncio.gather(*start(service, 2 * ROOM)) == [OUTPUT] * 2 * ROOM
    assert service.places["broken"].read == []
    assert len(service.jobs) == 2 * ROOM


@pytest.mark.parametrize("after_s", [0.0, LOOK_S / 2, LOOK_S, 1.5 * LOOK_S, PREFILL_S])
async def test_a_cancel_at_any_time_leaves_no_promise(pairs: Pairs, after_s: float) -> None:
    """`pairs` is empty at the end: nobody keeps a place that he never comes to take."""
    service = Service(pairs, "old", "new", "newer")
    requests = start(service, 4 * ROOM)
    await asyncio.sleep(after_s)
    for request in requests:
        request.cancel()
    found = await asyncio.gather(*requests, return_exceptions=True)
    assert {type(one) for one in found} == {asyncio.CancelledError}
    assert all(stream.cancelled for stream in service.streams)
    assert not any(pair.inside for pair in service.places.values())


async def test_a_cancel_while_a_row_is_on_its_way_leaves_no_promise(
    pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service(pairs, "old", "new")
    moved = pairs.moved

    def moved_and_cancelled(*arguments: Any) -> bool:
        if answer := moved(*arguments):
            requests[ROOM].cancel()
        return answer

    monkeypatch.setattr(pairs, "moved", moved_and_cancelled)
    requests = start(service, ROOM + 1)
    found = await asyncio.gather(*requests, return_exceptions=True)
    assert found[:ROOM] == [OUTPUT] * ROOM
    assert isinstance(found[ROOM], asyncio.CancelledError)
    assert len(service.jobs) == ROOM + 1
