"""The router's view of the pairs: a Serve handle with plain errors and streams that close."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from ray.exceptions import RayActorError, RayTaskError

from twotower.cluster.remote import plain_error, plainly
from twotower.deployments.pair import Job
from twotower.towers.protocols import Block


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
                yield block
        except (RayTaskError, RayActorError) as error:
            raise plain_error(error) from None
        finally:
            stream.cancel()

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        """As TowerPair.score."""
        scores: list[float] = await plainly(self._handle.score.remote(list(token_ids)))
        return scores

    async def ping(self) -> None:
        """Returns if a pair can serve."""
        await plainly(self._handle.ping.remote())
