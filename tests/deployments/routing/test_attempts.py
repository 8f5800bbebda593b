"""A request over pairs that die: each rule of what is tried again, over pairs that have a plan."""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from grpc import StatusCode
from grpc.aio import AioRpcError, Metadata
from ray.exceptions import ActorDiedError, NodeDiedError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from twotower.deployments.pair.tower_pair import Job
from twotower.deployments.routing import pairs, retry
from twotower.deployments.routing.attempts import (
    BLOCK_STREAM,
    MOST_STREAMED_IDS,
    Attempts,
    PairClient,
)
from twotower.deployments.routing.pairs import Pairs
from twotower.deployments.routing.policy import Room
from twotower.deployments.routing.retry import LostTooOftenError, RetryPolicy
from twotower.towers.decoding.commit_log import CommitLog
from twotower.towers.decoding.services import Block, ProvisionalBlock, Scores
from twotower.towers.errors import (
    CapacityError,
    InvalidRequestError,
    NumericalError,
    QueueFullError,
    UnavailableError,
)
from twotower.towers.request.params import GenerationParams

PROMPT = (5, 6, 7)
OUTPUT = tuple(range(100, 120))
BLOCK = 4
BLOCKS = len(OUTPUT) // BLOCK
JOB = Job("first", PROMPT, (), GenerationParams(max_tokens=len(OUTPUT), seed=1))
BUSY = BackPressureError(num_queued_requests=3, max_queued_requests=3)
ABSENT = DeploymentUnavailableError(DeploymentID("TowerPair", "app"))
ACTOR_DIED = RayTaskError("generate", "trace", ActorDiedError()).as_instanceof_cause()
DEATHS: list[Exception] = [
    UnavailableError("a tower is gone"),
    ActorDiedError(),
    ACTOR_DIED,
    NodeDiedError("the node died"),
    TimeoutError("no answer"),
    ABSENT,
    *(
        AioRpcError(code, Metadata(), Metadata(), "Socket closed")
        for code in (StatusCode.UNAVAILABLE, StatusCode.INTERNAL, StatusCode.CANCELLED)
    ),
]


def block_at(position: int) -> Block:
    """The block of the one true output that starts at a position of it."""
    token_ids = OUTPUT[position : position + BLOCK]
    last = position + BLOCK >= len(OUTPUT)
    return Block(
        len(PROMPT) + position,
        token_ids,
        (0,) * len(token_ids),
        (0.5,) * len(token_ids),
        nfe=3,
        context_passes=1,
        finish_reason="length" if last else None,
        log_probs=tuple(-float(token) for token in token_ids),
        cached_tokens=2,
    )


async def all_of(job: Job) -> AsyncIterator[Block]:
    """A pair that does what is asked of it."""
    for position in range(len(job.generated), len(OUTPUT), BLOCK):
        await asyncio.sleep(0)
        yield block_at(position)


Pair = Callable[[Job], AsyncIterator[Block]]


def dying(error: Exception, after: int = 0) -> Pair:
    """A pair that is lost after so many blocks."""

    async def blocks(job: Job) -> AsyncIterator[Block]:
        count = 0
        async for block in all_of(job):
            if count == after:
                raise error
            yield block
            count += 1
        raise error

    return blocks


async def silent(_: Job) -> AsyncIterator[Block]:
    """Serve, while no pair is up."""
    await asyncio.sleep(60)
    yield block_at(0)


class Stream:
    """What a streaming call of Serve gives; notes whether it was cancelled."""

    def __init__(self, blocks: AsyncIterator[Block]) -> None:
        self._blocks = blocks
        self.cancelled = False

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Block:
        assert not self.cancelled, "a closed attempt is read"
        return await anext(self._blocks)

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """A deployment of pairs: each call goes to the next of the plan, or to one that works."""

    def __init__(self, *plan: Pair) -> None:
        self.plan = list(plan)
        self.jobs: list[Job] = []
        self.streams: list[Stream] = []
        self.up = True
        self.scores: list[Exception] = []
        self.generate = self.score = self.ping = self
        self._method = ""

    def options(self, **_: object) -> Handle:
        return self

    def remote(self, *arguments: Any) -> Any:
        if not arguments:
            return self._ping()
        if isinstance(arguments[0], Job):
            return self._generate(arguments[0])
        return self._score(*arguments)

    def _generate(self, job: Job) -> Stream:
        assert all(stream.cancelled for stream in self.streams), "two attempts at once"
        self.jobs.append(job)
        self.streams.append(Stream((self.plan.pop(0) if self.plan else all_of)(job)))
        return self.streams[-1]

    async def _ping(self) -> bool:
        if not self.up:
            await asyncio.sleep(60)
        return True

    async def _score(self, token_ids: Sequence[int], top_logprobs: int) -> Scores:
        if self.scores:
            raise self.scores.pop(0)
        log_probs = [-float(token) for token in token_ids[1:]]
        return Scores(log_probs, [((token, -0.5),) * top_logprobs for token in token_ids[1:]])


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "backoff_s", lambda _: 0.001)


async def run(handle: Handle, job: Job = JOB, policy: RetryPolicy | None = None) -> CommitLog:
    """The log at the end, with each block checked for its place."""
    log = CommitLog(len(job.prompt), job.generated)
    await fill(log, handle, job, policy)
    return log


async def fill(log: CommitLog, handle: Handle, job: Job, policy: RetryPolicy | None) -> None:
    attempts = Attempts(PairClient(handle), policy or RetryPolicy(20, max_attempts=8), Room(4, 4))
    async for block in attempts.blocks(job, log):
        assert block.start == log.end
        log.append(block)


def seen(log: CommitLog) -> tuple[object, ...]:
    return log.token_ids, log.nfe, log.context_passes, log.cached_tokens, log.finish_reason


@pytest.mark.parametrize("error", DEATHS, ids=[type(error).__name__ for error in DEATHS])
async def test_a_death_at_any_block_loses_nothing(error: Exception) -> None:
    whole = await run(Handle())
    for after in range(BLOCKS + 1):
        handle = Handle(dying(error, after))
        log = await run(handle)
        assert seen(log) == seen(whole)
        # After its last block a request has no use for another pair.
        assert len(handle.jobs) == (1 if after == BLOCKS else 2)
        assert all(stream.cancelled for stream in handle.streams)
        if after < BLOCKS:
            assert handle.jobs[1].generated == OUTPUT[: after * BLOCK]


async def test_each_pair_that_serves_is_told_before_its_first_block() -> None:
    names = iter(("p1", "p2"))

    class Routing(Handle):
        """Says of each call which pair has it, as Serve does."""

        def _generate(self, job: Job) -> Stream:
            pairs.PAIRS.routed(job.row_id, next(names))
            return super()._generate(job)

    log, seen_there = CommitLog(len(JOB.prompt), JOB.generated), list[object]()
    client = PairClient(Routing(dying(DEATHS[0], 1)))
    attempts = Attempts(client, RetryPolicy(20, max_attempts=8), Room(4, 4))
    async for block in attempts.blocks(JOB, log, seen_there.append):
        log.append(block)
        seen_there.append(block.start)
    starts = [item for item in seen_there if isinstance(item, int)]
    assert seen_there == ["p1", starts[0], "p2", *starts[1:]]
    assert len(starts) == BLOCKS


async def test_each_attempt_has_a_name_of_its_own() -> None:
    handle = Handle(*[dying(DEATHS[0], 1)] * 3)
    await run(handle)
    names = [job.row_id for job in handle.jobs]
    assert names[0] == "first"
    assert len(set(names)) == 4
    assert all(len(name) == 32 for name in names[1:])
    assert [len(job.generated) for job in handle.jobs] == [0, 4, 8, 12]
    assert {(job.prompt, job.params) for job in handle.jobs} == {(PROMPT, JOB.params)}


async def test_a_resumed_request_is_resumed_again() -> None:
    handle = Handle(dying(DEATHS[0], 2))
    log = await run(handle, Job("first", PROMPT, OUTPUT[:4], JOB.params))
    assert log.token_ids == OUTPUT
    assert handle.jobs[1].generated == OUTPUT[:12]


async def test_what_a_request_is_served_with_outlives_its_pairs() -> None:
    """The first block settles how far it is eased; the next pair may not decide anew."""

    def easing(share: float, deaths_after: int) -> Pair:
        async def blocks(job: Job) -> AsyncIterator[Block]:
            count = 0
            async for block in all_of(job):
                if count == deaths_after:
                    raise DEATHS[0]
                yield replace(block, eased=share if job.params.may_be_eased else 0.0)
                count += 1

        return blocks

    asked = replace(JOB.params, steps_per_block=16, min_steps_per_block=4)
    handle = Handle(easing(1.0, 0), easing(0.5, 2), easing(1.0, BLOCKS))
    log = await run(handle, replace(JOB, params=asked))
    assert log.token_ids == OUTPUT
    first, second, third = (job.params for job in handle.jobs)
    # A pair that was lost before its first block has settled nothing.
    assert first == second == asked
    assert third == replace(asked, steps_per_block=10, min_steps_per_block=None)
    assert log.served(asked) == third


async def test_late_blocks_of_an_earlier_attempt_are_dropped() -> None:
    async def late(job: Job) -> AsyncIterator[Block]:
        yield block_at(0)
        yield block_at(4)
        async for block in all_of(job):
            yield block

    handle = Handle(dying(DEATHS[0], 3), late)
    assert seen(await run(handle)) == seen(await run(Handle()))


def draft_at(position: int, step: int) -> ProvisionalBlock:
    start = len(PROMPT) + position
    return ProvisionalBlock(start, step, (9,) * BLOCK, (True,) * BLOCK, (0.5,) * BLOCK)


def drafting(error: Exception | None = None, after: int = 0) -> Pair:
    """A pair that gives two drafts before each block, and may be lost after some blocks between
    two drafts."""

    async def items(job: Job) -> AsyncIterator[Any]:
        count = 0
        async for block in all_of(job):
            yield draft_at(block.start - len(PROMPT), 0)
            if error is not None and count == after:
                raise error
            yield draft_at(block.start - len(PROMPT), 1)
            yield block
            count += 1

    return items


async def test_drafts_are_handed_on_and_come_again_after_a_loss() -> None:
    handle = Handle(drafting(DEATHS[0], 1), drafting())
    log = CommitLog(len(PROMPT), ())
    attempts = Attempts(PairClient(handle), RetryPolicy(20, max_attempts=8), Room(4, 4))
    seen_drafts: list[tuple[int, int]] = []
    async for item in attempts.blocks(JOB, log):
        if isinstance(item, ProvisionalBlock):
            seen_drafts.append((item.start - len(PROMPT), item.step))
        else:
            assert log.append(item)
    assert log.token_ids == OUTPUT
    assert handle.jobs[1].generated == OUTPUT[:4]
    rest = [(position, step) for position in range(4, len(OUTPUT), BLOCK) for step in (0, 1)]
    assert seen_drafts == [(0, 0), (0, 1), (4, 0), *rest]


async def test_drafts_do_not_make_up_for_losses() -> None:
    """A pair that dies after a draft, again and again, has done nothing for the request."""
    handle = Handle(*[drafting(DEATHS[0])] * 9)
    attempts = Attempts(PairClient(handle), RetryPolicy(20, max_attempts=3), Room(4, 4))

    async def read() -> None:
        async for item in attempts.blocks(JOB, CommitLog(len(PROMPT), ())):
            assert isinstance(item, ProvisionalBlock)

    with pytest.raises(LostTooOftenError):
        await read()
    assert len(handle.jobs) == 3


async def test_after_a_gap_the_attempt_is_given_up() -> None:
    async def skipping(_: Job) -> AsyncIterator[Block]:
        yield block_at(0)
        yield block_at(8)
        raise AssertionError("read on after a gap")

    handle = Handle(skipping)
    assert seen(await run(handle)) == seen(await run(Handle()))
    assert handle.jobs[1].generated == OUTPUT[:4]


FINAL = [NumericalError("nan"), InvalidRequestError("seed", -1, "0"), CapacityError("never fits")]
FINAL += [RuntimeError("a bug"), QueueFullError("queue: 3 rows"), BUSY]


@pytest.mark.parametrize("error", FINAL, ids=[type(error).__name__ for error in FINAL])
async def test_what_is_no_loss_ends_the_request(error: Exception) -> None:
    handle = Handle(dying(error, 0))
    with pytest.raises(type(error)):
        await run(handle)
    assert len(handle.jobs) == 1
    assert handle.streams[0].cancelled


@pytest.mark.parametrize("error", [QueueFullError("queue: 3 rows"), BUSY], ids=["pair", "serve"])
async def test_a_request_that_lost_its_pair_waits_for_its_place(error: Exception) -> None:
    handle = Handle(dying(DEATHS[0], 1), *[dying(error)] * 20)
    policy = RetryPolicy(20, max_attempts=3)
    assert (await run(handle, policy=policy)).token_ids == OUTPUT
    assert len(handle.jobs) == 22


async def test_a_place_that_does_not_come_free_is_no_refusal() -> None:
    handle = Handle(dying(DEATHS[0], 1), *[dying(QueueFullError("queue: 3 rows"))] * 10_000)
    with pytest.raises(UnavailableError, match="no pair of towers has room"):
        await run(handle, policy=RetryPolicy(0.1, max_attempts=8))


async def test_a_request_that_is_lost_with_every_pair_is_given_up() -> None:
    handle = Handle(dying(DEATHS[0], 2), *[dying(DEATHS[0])] * 20)
    log = CommitLog(3, ())
    with pytest.raises(LostTooOftenError, match="lost with 4 pairs in a row"):
        await fill(log, handle, JOB, RetryPolicy(20, max_attempts=4))
    # A block is progress: the one that brought two does not count.
    assert len(handle.jobs) == 4
    assert log.token_ids == OUTPUT[:8]


async def test_what_a_broken_pair_loses_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve sends all to one pair, the only one, until it is replaced."""
    pairs = Pairs()
    monkeypatch.setattr("twotower.deployments.routing.pairs.PAIRS", pairs)

    class Only(Handle):
        def _generate(self, job: Job) -> Stream:
            pairs.routed(job.row_id, "only")
            return super()._generate(job)

    handle = Only(*[dying(DEATHS[0])] * 20)
    log = await run(handle, policy=RetryPolicy(20, max_attempts=3))
    assert log.token_ids == OUTPUT
    assert len(handle.jobs) == 21


async def test_progress_forgets_earlier_losses() -> None:
    handle = Handle(*[dying(DEATHS[0]), dying(DEATHS[0]), dying(DEATHS[0], 1)] * 3)
    log = await run(handle, policy=RetryPolicy(20, max_attempts=4))
    assert log.token_ids == OUTPUT


async def test_with_no_pair_up_the_wait_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twotower.deployments.routing.attempts.PING_TIMEOUT_S", 0.05)
    for plan in ([silent], [dying(DEATHS[0], 1), silent]):
        handle = Handle(*plan)
        handle.up = False
        begin = time.monotonic()
        with pytest.raises(UnavailableError, match="no pair of towers is up"):
            await run(handle, policy=RetryPolicy(0.2, max_attempts=8))
        assert 0.2 <= time.monotonic() - begin < 5
        assert handle.streams[-1].cancelled


async def test_losses_without_an_end_are_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "backoff_s", lambda _: 0.05)
    handle = Handle(*[dying(UnavailableError("gone"))] * 1000)
    begin = time.monotonic()
    with pytest.raises(UnavailableError, match="gone"):
        await run(handle, policy=RetryPolicy(0.3, max_attempts=1000))
    assert 0.2 < time.monotonic() - begin < 5
    assert len(handle.jobs) > 2


async def test_a_pair_that_comes_up_in_time_gets_the_request() -> None:
    async def soon(job: Job) -> AsyncIterator[Block]:
        await asyncio.sleep(0.2)
        async for block in all_of(job):
            yield block

    handle = Handle(dying(DEATHS[0], 1), soon)
    assert (await run(handle)).token_ids == OUTPUT


async def test_a_long_queue_is_no_loss() -> None:
    """Pairs are up and busy: the wait may be longer than the resume timeout."""

    async def queued(job: Job) -> AsyncIterator[Block]:
        await asyncio.sleep(0.5)
        async for block in all_of(job):
            yield block

    handle = Handle(queued)
    assert (await run(handle, policy=RetryPolicy(0.1, max_attempts=8))).token_ids == OUTPUT
    assert len(handle.jobs) == 1


async def test_a_long_queue_between_two_losses_is_no_wait_for_a_pair() -> None:
    """The timeout counts from a loss until a pair that is up has the request, not until the next
    loss."""

    async def queued_and_lost(_: Job) -> AsyncIterator[Block]:
        await asyncio.sleep(0.5)
        raise DEATHS[0]
        yield block_at(0)

    handle = Handle(dying(DEATHS[0]), queued_and_lost, queued_and_lost)
    assert (await run(handle, policy=RetryPolicy(0.2, max_attempts=8))).token_ids == OUTPUT
    assert len(handle.jobs) == 4


@pytest.mark.parametrize(
    "plan",
    [[silent], [dying(DEATHS[0], 1), silent], [dying(DEATHS[0])] * 1000],
    ids=["waiting", "resumed", "between two attempts"],
)
async def test_a_cancel_wins(plan: list[Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "backoff_s", lambda _: 0.4)
    handle = Handle(*plan)
    task = asyncio.create_task(run(handle, policy=RetryPolicy(20, max_attempts=1000)))
    await asyncio.sleep(0.2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 2)
    asked = len(handle.jobs)
    assert all(stream.cancelled for stream in handle.streams)
    await asyncio.sleep(0.5)
    assert len(handle.jobs) == asked


async def test_a_score_is_repeated_too() -> None:
    handle = Handle()
    handle.scores = [ActorDiedError(), UnavailableError("gone")]
    attempts = Attempts(PairClient(handle), RetryPolicy(20, max_attempts=8), Room(4, 4))
    scores = await attempts.score([4, 5, 6], 2)
    assert scores == Scores([-5.0, -6.0], [((5, -0.5),) * 2, ((6, -0.5),) * 2])
    handle.scores = [NumericalError("nan")]
    with pytest.raises(NumericalError):
        await attempts.score([4, 5])


async def test_calls_of_one_request_are_told_apart() -> None:
    """Serve matches a call that waits with the identity that this context gives it."""
    from ray.serve.context import (
        _get_serve_request_context,
        _RequestContext,
        _serve_request_context,
    )

    seen_by_calls: list[_RequestContext] = []

    class Noting(Handle):
        def remote(self, *args: object) -> object:
            seen_by_calls.append(_get_serve_request_context())
            return super().remote(*args)

    handle = Noting(all_of, all_of)
    whole = _RequestContext(request_id="mine", _internal_request_id="shared")
    before = _serve_request_context.set(whole)
    try:
        await run(handle)
        assert _get_serve_request_context() is whole
    finally:
        _serve_request_context.reset(before)
    assert [context._internal_request_id for context in seen_by_calls] == [""]
    assert [context.request_id for context in seen_by_calls] == ["mine"]


async def test_a_stream_that_its_pair_cancels_goes_on_elsewhere() -> None:
    """So does a pair whose grace to end its streams is over; nobody here has cancelled."""

    async def stopping(job: Job) -> AsyncIterator[Block]:
        yield block_at(len(job.generated))
        raise asyncio.CancelledError

    handle = Handle(stopping)
    assert (await run(handle)).token_ids == OUTPUT
    assert [len(job.generated) for job in handle.jobs] == [0, BLOCK]


@pytest.mark.parametrize("listed", [True, False])
async def test_a_silent_pair_is_left_once_serve_has_given_it_up(
    listed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that is lost without a word closes no stream."""
    known = Pairs()
    known.present(["silent", "other"] if listed else ["other"])
    monkeypatch.setattr(pairs, "PAIRS", known)
    names = iter(("silent", "other"))

    class Routing(Handle):
        def _generate(self, job: Job) -> Stream:
            known.routed(job.row_id, next(names))
            return super()._generate(job)

    async def falls_silent(_: Job) -> AsyncIterator[Block]:
        yield block_at(0)
        await asyncio.sleep(60)

    handle = Routing(falls_silent)
    running = asyncio.create_task(run(handle, policy=RetryPolicy(0.05, max_attempts=3)))
    done, _ = await asyncio.wait([running], timeout=0.5)
    assert bool(done) is not listed
    if done:
        assert running.result().token_ids == OUTPUT
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


def test_prompts_that_may_be_too_long_for_a_message_go_as_a_task() -> None:
    class Noting:
        """A handle that is called by its options."""

        def __init__(self, **options: Any) -> None:
            self.given = options

        def options(self, **options: Any) -> Noting:
            return Noting(**self.given, **options)

    client = PairClient(Noting())
    long = replace(JOB, prompt=(7,) * (MOST_STREAMED_IDS + 1))
    assert client._handle_for(JOB).given == {"stream": True, **BLOCK_STREAM}
    assert client._handle_for(long).given == {"stream": True}
    # Ids of the greatest vocabulary, in the message that Ray makes of the longest.
    most = replace(JOB, prompt=tuple(range(2**31 - MOST_STREAMED_IDS, 2**31)))
    assert len(pickle.dumps((most,), protocol=pickle.HIGHEST_PROTOCOL)) < (4 << 20) - (64 << 10)
