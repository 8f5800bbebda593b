"""The router's view of the pairs: a Serve handle with plain errors and streams that close."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
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

from twotower.cluster.remote import plain_error
from twotower.deployments.breaker import PAIRS
from twotower.deployments.losses import BrokenPairError
from twotower.deployments.pair import Job
from twotower.towers.errors import UnavailableError
from twotower.towers.protocols import Block

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
        stream = self._streaming.generate.remote(job)
        try:
            async for block in stream:
                PAIRS.worked(job.row_id)
                yield block
        except (*_WRAPPED, UnavailableError) as error:
            plain = _plain(error)
            if isinstance(plain, UnavailableError) and PAIRS.lost(job.row_id):
                plain = BrokenPairError(str(plain))
            raise plain from None
        finally:
            stream.cancel()
            PAIRS.ended(job.row_id)

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
