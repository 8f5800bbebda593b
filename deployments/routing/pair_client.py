"""The router's view of the pairs: a Serve handle with plain errors and streams that close."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack
from typing import Any

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

from twotower.cluster.services.ray_errors import plain_error
from twotower.deployments.pair.tower_pair import Job
from twotower.deployments.routing.moves import Room
from twotower.deployments.routing.pairs import PAIRS
from twotower.deployments.routing.retry import BrokenPairError
from twotower.towers.decoding.services import Block
from twotower.towers.errors import QueueFullError, UnavailableError

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


class PairClient:
    """Calls the deployment of pairs; Serve chooses the replica."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._streaming = handle.options(stream=True)

    async def generate(self, job: Job) -> AsyncGenerator[Block, None]:
        """The blocks of a job; closing it frees the row. Raises what the pair raised."""
        # Before the call, which Serve may route at once.
        PAIRS.opened(job.row_id)
        with ExitStack() as ending:
            ending.callback(PAIRS.ended, job.row_id)
            try:
                stream = self._streaming.generate.remote(job)
                ending.callback(stream.cancel)
                async for block in stream:
                    PAIRS.worked(job.row_id)
                    if block.finish_reason is not None:
                        # Its place may have been given to the next before the stream has ended.
                        PAIRS.ended(job.row_id)
                    yield block
            except (*_WRAPPED, UnavailableError) as error:
                plain = _plain(error)
                if isinstance(plain, QueueFullError):
                    PAIRS.refused(job.row_id)
                if isinstance(plain, UnavailableError) and PAIRS.lost(job.row_id):
                    plain = BrokenPairError(str(plain))
                raise plain from None

    def moved(self, row_id: str, next_id: str, room: Room) -> bool:
        """Whether the row waits for a place in its pair, and another has one for it. Then the row
        belongs there, as the attempt `next_id`."""
        return PAIRS.moved(row_id, next_id, room)

    def forget(self, row_id: str) -> None:
        """The attempt is over, or will not be made."""
        PAIRS.ended(row_id)

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        """As TowerPair.score."""
        try:
            scores: list[float] = await self._handle.score.remote(list(token_ids))
        except _WRAPPED as error:
            raise _plain(error) from None
        return scores

    async def ping(self) -> None:
        """Returns if a pair can serve."""
        try:
            await self._handle.ping.remote()
        except _WRAPPED as error:
            raise _plain(error) from None


def _plain(error: BaseException) -> BaseException:
    if isinstance(error, _GONE):
        return UnavailableError("a node or process that held the request is gone; try again")
    return plain_error(error)
