"""A deployment of one pair in this process, with real towers and without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from functools import cache
from pathlib import Path
from typing import Any

from tests.support.rows import Pair, Towers
from twotower.cluster.services.actors import ContextTowerActor, DenoiserTowerActor
from twotower.cluster.services.tower_services import PairServices
from twotower.cluster.topology import PairTopology
from twotower.deployments.pair.tower_pair import Job, TowerPair
from twotower.towers.checkpoint.weights import load_context_tower, load_denoiser_tower
from twotower.towers.engine.options import EngineOptions


@cache
def _towers(folder: Path) -> Towers:
    """Towers of a folder, whose weights all handles share."""
    return load_context_tower(folder), load_denoiser_tower(folder)


class HandleHere:
    """What Serve's handle of the pairs is to a router, as far as it is used; calls go to one pair
    on the engines of this process. Make it where the event loop runs."""

    def __init__(self, folder: Path, max_num_seqs: int = 8, max_context: int = 512) -> None:
        options = EngineOptions(
            max_num_seqs=max_num_seqs, max_context=max_context, max_queued_requests=64
        )
        engines = Pair.of(*_towers(folder), options=options)
        self.context, self.denoiser = engines.context, engines.denoiser
        topology = PairTopology(str(folder), "cpu", "float32", options, 0.4, 0.0, 1)
        context, denoiser = ContextTowerActor(topology), DenoiserTowerActor(topology)
        context.run(self.context)
        denoiser.run(self.denoiser)

        async def start() -> PairServices:
            return PairServices(context, denoiser)

        self.pair = TowerPair(start)
        self.generate, self.score, self.ping = (
            _Generate(self),
            _Call(self, "score"),
            _Call(self, "ping"),
        )

    def options(self, **_: object) -> HandleHere:
        """The same handle, whatever the options."""
        return self

    def rows(self) -> int:
        """Rows that either tower holds or queues."""
        return self.context.num_rows + self.denoiser.num_rows


class _Call:
    """A unary method of the pair."""

    def __init__(self, handle: HandleHere, name: str) -> None:
        self._handle = handle
        self._name = name

    async def remote(self, *args: Any) -> Any:
        return await getattr(self._handle.pair, self._name)(*args)


class _Generate:
    """The streaming method of the pair."""

    def __init__(self, handle: HandleHere) -> None:
        self._handle = handle

    def remote(self, job: Job) -> _Stream:
        return _Stream(self._handle.pair.generate(job))


class _Stream:
    """A streaming call: an async iterator that can be cancelled without waiting for it."""

    def __init__(self, blocks: AsyncGenerator[Any, None]) -> None:
        self._blocks = blocks
        self._reading: asyncio.Future[Any] | None = None

    def __aiter__(self) -> _Stream:
        return self

    async def __anext__(self) -> Any:
        self._reading = asyncio.ensure_future(anext(self._blocks))
        return await self._reading

    def cancel(self) -> None:
        """Ends the call as Serve does: the pair's generator is closed in its own time."""
        if self._reading is not None:
            self._reading.cancel()
        self._closing = asyncio.ensure_future(self._close())

    async def _close(self) -> None:
        if self._reading is not None:
            await asyncio.gather(self._reading, return_exceptions=True)
        await self._blocks.aclose()
