"""One request over as many pairs as it takes: no committed block is lost, repeated or changed.

Attempts makes one attempt after another, PairClient makes the calls of an attempt, and Serve
asks PairChooser which pair gets it.

An attempt is the request's prompt with the tokens committed so far, under a new name, on
the pair that Serve chooses. When it is lost, what it may still send goes with its stream, and the
next attempt goes on from the log's end: random numbers belong to seed and position, so the tokens
are those of the undisturbed request.

An attempt that has not begun and has no place in its pair moves to one that has room, such as a new
pair that autoscaling has brought: that ends it too, but nothing was lost.

Serve pickles the module of PairChooser by value: what the two sides share is in `pairs.PAIRS`, in a
module that is not.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import secrets
from collections.abc import Callable, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import replace
from typing import Any, TypeVar

import grpc
from grpc.aio import AioRpcError
from ray.exceptions import (
    ActorPlacementGroupRemoved,
    ActorUnschedulableError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.serve.context import _get_serve_request_context, _serve_request_context
from ray.serve.exceptions import BackPressureError
from ray.serve.request_router import RequestRouter

from twotower.cluster.services.ray_errors import plain_error
from twotower.deployments.pair.tower_pair import Job
from twotower.deployments.routing import pairs, policy
from twotower.deployments.routing.patience import Patience
from twotower.deployments.routing.retry import BrokenPairError, Losses, NoPairError, RetryPolicy
from twotower.towers.decoding.commit_log import CommitLog
from twotower.towers.decoding.generation import Blocks
from twotower.towers.decoding.services import Block, ProvisionalBlock, Scores
from twotower.towers.errors import QueueFullError, UnavailableError

logger = logging.getLogger("ray.serve")

PING_TIMEOUT_S = 5.0
# Ways in which Ray says that the process or node behind a call has gone, beside RayActorError.
_GONE = (
    ActorPlacementGroupRemoved,
    ActorUnschedulableError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    WorkerCrashedError,
)
_WRAPPED = (RayTaskError, RayActorError, *_GONE)
# Ends of a stream between replicas that come of the other's end.
_BROKEN = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
)
_LOST_TEXT = "a node or process that held the request is gone; try again"
# How blocks come from a pair: over a gRPC stream between the replicas, and not each as the result
# of an actor's task, which costs three times as much. Options of Serve's handle.
BLOCK_STREAM: dict[str, Any] = {
    "_by_reference": False,
    "request_serialization": "pickle",
    "response_serialization": "pickle",
}
# Prompts of more tokens go as an actor's task: Ray's replicas take messages of 4 MiB by default,
# and an id has up to 5 bytes.
MOST_STREAMED_IDS = 500_000
T = TypeVar("T")
# Takes the name of a pair.
Told = Callable[[str], None]


def _nobody(_pair: str) -> None:
    """For callers that do not ask."""


def attempt_id() -> str:
    """A row's name that no other attempt at any request has had: 128 random bits."""
    return secrets.token_hex(16)


class _MovedError(Exception):
    """The attempt has ended here: the next one has a place in another pair."""


class Attempts:
    """Gives requests to pairs, and to other pairs when those are lost or others have room."""

    def __init__(self, client: PairClient, retry: RetryPolicy, room: policy.Room) -> None:
        self._client = client
        self._retry = retry
        self._room = room

    async def blocks(self, job: Job, log: CommitLog, served_by: Told = _nobody) -> Blocks:
        """The job's blocks from the log's end on, in order, and drafts if it asks for them.
        `served_by` is told of each attempt's pair before its first block.

        The caller commits each block before it asks for the next. After a loss drafts of a block
        may come again. Raises what the pair raised if that
        is not a loss; UnavailableError if no pair came up in time; LostTooOftenError.
        """
        losses = Losses(self._retry)
        next_id = attempt_id()
        try:
            while True:
                try:
                    async with aclosing(self._read(job, next_id, losses, served_by)) as stream:
                        async for block in stream:
                            if isinstance(block, ProvisionalBlock):
                                yield block
                                continue
                            # A gap raises here: the attempt is lost, the next closes the gap.
                            if not log.has(block):
                                yield block
                                losses.forget()
                    return
                except _MovedError:
                    losses.queued()
                except Exception as error:
                    if log.finish_reason is not None:
                        # Lost after its last block: nothing is left to do.
                        return
                    await losses.pause(error)
                    logger.info("a request goes on at %d: %s", log.end, type(error).__name__)
                params = log.served(job.params)
                job = replace(job, row_id=next_id, generated=log.token_ids, params=params)
                next_id = attempt_id()
        finally:
            # One of them may have been promised a place that it never came to take.
            pairs.PAIRS.ended(job.row_id)
            pairs.PAIRS.ended(next_id)

    async def score(self, token_ids: Sequence[int], top_logprobs: int = 0) -> Scores:
        """Log-probabilities of tokens 1..n-1 of a text; see TowerPair.score."""
        losses = Losses(self._retry)
        while True:
            try:
                with self._patience(losses) as patience:
                    return await patience.wait(self._client.score(token_ids, top_logprobs))
            except Exception as error:
                await losses.pause(error)

    async def _read(self, job: Job, next_id: str, losses: Losses, served_by: Told) -> Blocks:
        """The blocks of one attempt. Raises _MovedError if it moves before the first."""
        begun = False

        def look() -> None:
            if not begun and pairs.PAIRS.moved(job.row_id, next_id, self._room):
                raise _MovedError

        stream = self._client.generate(job, served_by)
        async with aclosing(stream):
            with self._patience(losses, look, job.row_id) as patience:
                while (block := await patience.wait(anext(stream, None))) is not None:
                    begun = True
                    yield block

    def _patience(
        self,
        losses: Losses,
        look: Callable[[], None] = lambda: None,
        row_id: str | None = None,
    ) -> Patience:
        """For the answers of one attempt: waits go on while a pair is up, and the row's is none
        that Serve has given up."""

        async def check() -> None:
            await self._check_up()
            if row_id is not None and pairs.PAIRS.gone(row_id):
                raise UnavailableError(_LOST_TEXT)
            losses.queued()

        return Patience(check, self._retry.resume_timeout_s, look)

    async def _check_up(self) -> None:
        try:
            async with asyncio.timeout(PING_TIMEOUT_S):
                await self._client.ping()
        except BackPressureError:
            # The pairs are up, and busy.
            return
        except Exception as error:
            raise NoPairError("no pair of towers is up; try again later") from error


class PairClient:
    """Calls the deployment of pairs; Serve chooses the replica."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._long = handle.options(stream=True)
        self._streaming = self._long.options(**BLOCK_STREAM)

    async def generate(self, job: Job, served_by: Told = _nobody) -> Blocks:
        """The blocks of a job; closing it frees the row. Raises what the pair raised. `served_by`
        is told of the pair before the first block."""
        told = False
        # Before the call, which Serve may route at once.
        pairs.PAIRS.opened(job.row_id)
        with ExitStack() as ending:
            ending.callback(pairs.PAIRS.ended, job.row_id)
            try:
                stream = _apart(lambda: self._handle_for(job).generate.remote(job))
                ending.callback(stream.cancel)
                async for block in stream:
                    pair = pairs.PAIRS.worked(job.row_id)
                    if pair is not None and not told:
                        told = True
                        served_by(pair)
                    if isinstance(block, Block) and block.finish_reason is not None:
                        # Its place may have been given to the next before the stream has ended.
                        pairs.PAIRS.ended(job.row_id)
                    yield block
            except (*_WRAPPED, UnavailableError, AioRpcError, asyncio.CancelledError) as error:
                if isinstance(error, asyncio.CancelledError) and _cancelled_here():
                    raise
                plain = _plain(error)
                if isinstance(plain, QueueFullError):
                    pairs.PAIRS.refused(job.row_id)
                if isinstance(plain, UnavailableError) and pairs.PAIRS.lost(job.row_id):
                    plain = BrokenPairError(str(plain))
                raise plain from None

    def _handle_for(self, job: Job) -> Any:
        short = len(job.prompt) + len(job.generated) <= MOST_STREAMED_IDS
        return self._streaming if short else self._long

    async def score(self, token_ids: Sequence[int], top_logprobs: int = 0) -> Scores:
        """As TowerPair.score."""
        try:
            scores: Scores = await _apart(
                lambda: self._handle.score.remote(list(token_ids), top_logprobs)
            )
        except _WRAPPED as error:
            raise _plain(error) from None
        return scores

    async def ping(self) -> None:
        """Returns if a pair can serve."""
        try:
            await _apart(self._handle.ping.remote)
        except _WRAPPED as error:
            raise _plain(error) from None


class PairChooser(RequestRouter):  # type: ignore[misc]
    """Serve's own rule, power of two choices, after `pairs.PAIRS` was asked.

    Without Serve's FIFOMixin, which would give the pair chosen for one call to the oldest that
    waits: here it matters which call gets which pair.
    """

    @property
    def _table(self) -> pairs.Pairs:
        """The router's table of pairs."""
        return pairs.PAIRS

    def initialize_state(self, num_routers: int = 1) -> None:
        """Takes the arguments that the deployment has for its router."""
        self._table.routers(num_routers)

    def update_replicas(self, replicas: list[Any]) -> None:
        """Notes which pairs there are: rows that wait may move to a new pair."""
        super().update_replicas(replicas)
        self._tell()
        self._table.reported({each.replica_id.unique_id: each.routing_stats for each in replicas})

    def on_replica_actor_died(self, replica_id: Any) -> None:
        """Notes that a pair is gone."""
        super().on_replica_actor_died(replica_id)
        self._tell()

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: Any = None
    ) -> list[list[Any]]:
        """Replicas to ask for their queue's length, in ranks."""
        del candidate_replicas
        ranks = self._table.choice(*_row_of(pending_request))
        return [[self._named[pair] for pair in rank] for rank in ranks]

    def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:
        """Notes which pair has an attempt."""
        del result
        row_id, _ = _row_of(pending_request)
        if row_id is not None:
            self._table.routed(row_id, replica_id.unique_id)

    def _tell(self) -> None:
        replicas = self.curr_replicas.items()
        self._named = {replica_id.unique_id: replica for replica_id, replica in replicas}
        self._table.present(list(self._named))


def _apart(call: Callable[[], T]) -> T:
    """Makes a call of Serve that has an identity of its own, and keeps the name of the request.

    Serve finds a call that waits for a replica by the identity of the request within which it is
    made. Calls that a request makes at a time would share it: one gets the replica of another, and
    the others none, or late.
    """

    def made() -> T:
        context = _get_serve_request_context()
        _serve_request_context.set(replace(context, _internal_request_id=""))
        return call()

    return contextvars.copy_context().run(made)


def _cancelled_here() -> bool:
    """Whether the running task is being cancelled; a pair that stops cancels its streams, too."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _plain(error: BaseException) -> BaseException:
    broken = isinstance(error, AioRpcError) and error.code() in _BROKEN
    if broken or isinstance(error, (*_GONE, asyncio.CancelledError)):
        return UnavailableError(_LOST_TEXT)
    return plain_error(error)


def _row_of(request: Any) -> tuple[str | None, Sequence[int]]:
    """Name and prompt of a call that generates; other calls have none."""
    job = request.args[0] if request is not None and request.args else None
    return getattr(job, "row_id", None), getattr(job, "prompt", ())
