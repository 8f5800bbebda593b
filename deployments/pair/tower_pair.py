"""A pair of towers as a Serve replica: start, health, counters, and its rows' block loops."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from twotower.cluster.services.tower_services import PairServices
from twotower.deployments.pair.metrics import PairMetrics, signals
from twotower.deployments.pair.overload import NO_DIAL, OverloadDial
from twotower.towers.decoding.draft_times import DraftTimes
from twotower.towers.decoding.generation import Blocks, generate_blocks
from twotower.towers.decoding.services import Scores
from twotower.towers.engine.stats import EngineStats
from twotower.towers.request.params import GenerationParams


@dataclass(frozen=True)
class Job:
    """A row to generate; `row_id` is drawn anew for every attempt."""

    row_id: str
    prompt: tuple[int, ...]
    generated: tuple[int, ...]
    params: GenerationParams


class TowerPair:
    """A context tower and its denoiser towers; a Serve replica.

    `start` brings both towers up. It runs with the first health check, which Serve awaits before
    it sends any request. `dial` eases rows that begin while others wait.
    """

    def __init__(
        self,
        start: Callable[[], Awaitable[PairServices]],
        metrics: Callable[[], PairMetrics] | None = None,
        dial: OverloadDial = NO_DIAL,
    ) -> None:
        self._start = start
        self._dial = dial
        self._draft_times = DraftTimes()
        self._metrics = metrics() if metrics is not None else None
        self._services: PairServices | None = None
        self._reported: dict[str, EngineStats] | None = None

    async def check_health(self) -> None:
        """Starts the towers or asks both how they are; an exception means replacement."""
        if self._services is None:
            self._services = await self._start()
        await asyncio.gather(*(tower.check() for tower in self._services.by_name().values()))
        if self._metrics is not None:
            stats = await self._stats()
            self._metrics.report(stats, self._dial.eased(stats["context"].queued_rows))

    async def generate(self, job: Job) -> Blocks:
        """Yields the row's blocks as they come, and drafts if it asks for them; the last block has
        a finish reason.

        Rows wait in order for room in the towers. Closing or cancelling the generator frees the
        row, or its place in the queue, in both towers. Raises CapacityError if too many wait.
        """
        services = await self._ready()
        blocks = generate_blocks(
            services.context,
            services.denoiser,
            job.row_id,
            job.prompt,
            job.params,
            job.generated,
            self._dial.eased,
            self._draft_times,
        )
        async with aclosing(blocks):
            async for block in blocks:
                yield block

    async def score(self, token_ids: Sequence[int], top_logprobs: int = 0) -> Scores:
        """Log-probabilities of tokens 1..n-1 under the context tower, and that many of the most
        probable tokens at each."""
        return await (await self._ready()).context.score(token_ids, top_logprobs)

    async def ping(self) -> bool:
        """True once both towers can serve."""
        await self.check_health()
        return True

    async def stats(self) -> dict[str, dict[str, float]]:
        """Counters of each tower, by tower and by name: for calls through Serve."""
        return {tower: stats.report() for tower, stats in (await self._stats()).items()}

    async def record_routing_stats(self) -> dict[str, dict[str, float]]:
        """As `stats`, for the routers; Serve asks for them and passes them on."""
        return {} if self._services is None else await self.stats()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """The pair's signals for the number of pairs, since the last call; Serve asks for them."""
        if self._services is None:
            return {}
        stats = await self._stats()
        before, self._reported = self._reported or stats, stats
        return signals(before, stats)

    async def _stats(self) -> dict[str, EngineStats]:
        towers = (await self._ready()).by_name()
        stats = await asyncio.gather(*(tower.stats() for tower in towers.values()))
        return dict(zip(towers, stats, strict=True))

    async def _ready(self) -> PairServices:
        if self._services is None:
            await self.check_health()
        assert self._services is not None
        return self._services
