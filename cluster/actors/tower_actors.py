"""One engine per Ray actor: the classes that run inside.

The classes are plain; `start_towers` wraps them. Loading is a call of its own, so that a faulty
checkpoint reaches the pair as the error it is and not as a dead actor.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import ray

from twotower.cluster.actors.faults import FaultyLink
from twotower.cluster.actors.link_fan import Link, LinkFan
from twotower.cluster.actors.loading import loaded
from twotower.cluster.channel.grpc import CPU, GrpcStateLink, LinkSpec
from twotower.cluster.channel.receiver import StateReceiver
from twotower.cluster.topology import PairTopology, max_update_bytes
from twotower.towers.checkpoint.weights import load_context_tower, load_denoiser_tower
from twotower.towers.decoding.services import Block, Prefilled
from twotower.towers.engine.context_engine import ContextEngine
from twotower.towers.engine.denoiser_engine import DenoiserEngine
from twotower.towers.errors import UnavailableError
from twotower.towers.model.denoiser_tower import DenoiserTower
from twotower.towers.request.params import GenerationParams


class ContextTowerActor:
    """Runs a ContextEngine and publishes its rows' states over links to the denoiser towers."""

    def __init__(self, topology: PairTopology) -> None:
        self._topology = topology
        self._links = LinkFan()
        self._disturbed: set[int] = set()
        self._engine: ContextEngine | None = None

    async def load(self) -> None:
        """Loads the tower and starts its engine. Raises CheckpointError, ConfigError."""
        tower = await loaded(load_context_tower, self._topology)
        options = self._topology.engine_options()
        link = None if self._topology.placement == "ar_only" else self._links
        engine = ContextEngine(tower, link, options, threaded=True)
        await asyncio.to_thread(engine.warm_up)
        self._engine = engine

    async def connect(self, denoiser: int, link: LinkSpec) -> None:
        """Links the tower to a denoiser tower; the link to it that was there ends."""
        tower = self.engine.tower
        state_link: Link = GrpcStateLink(
            link,
            tower.config,
            tower.dtype,
            tower.replay_tensors(),
            device=tower.device if link.transport == "nccl" else CPU,
        )
        faults = self._topology.faults
        if faults is not None and denoiser not in self._disturbed:
            self._disturbed.add(denoiser)
            state_link = FaultyLink(state_link, faults)
        await self._links.connect(denoiser, state_link)

    async def open(self, row_id: str, capacity: int) -> int:
        return await self.open_for(row_id, capacity, 0)

    async def open_for(self, row_id: str, capacity: int, denoiser: int) -> int:
        """See `ContextTowerService`."""
        self._links.assign(row_id, denoiser)
        try:
            return await self.engine.open(row_id, capacity)
        except BaseException:
            self._links.forget(row_id)
            raise

    async def move(self, row_id: str, denoiser: int) -> None:
        """See `ContextTowerService`."""
        await self.engine.reseed(row_id, lambda: self._links.move(row_id, denoiser))

    async def broken_links(self) -> list[int]:
        """See `ContextTowerService`."""
        return self._links.broken()

    async def prefill(
        self, row_id: str, prompt: Sequence[int], generated: Sequence[int], params: GenerationParams
    ) -> Prefilled:
        return await self.engine.prefill(row_id, prompt, generated, params)

    async def extend(self, row_id: str, token_ids: Sequence[int]) -> int:
        return await self.engine.extend(row_id, token_ids)

    async def decode(self, row_id: str, count: int, params: GenerationParams) -> Block:
        return await self.engine.decode(row_id, count, params)

    async def verify(self, row_id: str, draft: Sequence[int], params: GenerationParams) -> Block:
        return await self.engine.verify(row_id, draft, params)

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        return await self.engine.score(token_ids)

    async def release(self, row_id: str) -> None:
        await self.engine.release(row_id)

    async def stats(self) -> dict[str, float]:
        """The engine's counters."""
        return self.engine.stats()

    async def check(self) -> None:
        """Raises UnavailableError if the tower is not loaded or hangs."""
        self.engine.check_progress(self._topology.stall_timeout_s)

    async def close(self) -> None:
        """Ends the links."""
        await self._links.close()

    @property
    def engine(self) -> ContextEngine:
        """The loaded tower's engine. Raises UnavailableError before that."""
        if self._engine is None:
            raise UnavailableError("the context tower is not loaded")
        return self._engine


class DenoiserTowerActor:
    """Runs a DenoiserEngine and receives its mirrors' states over a link."""

    def __init__(self, topology: PairTopology) -> None:
        self._topology = topology
        self._tower: DenoiserTower | None = None
        self._running: tuple[DenoiserEngine, StateReceiver] | None = None

    async def load(self) -> None:
        """Loads the tower. Raises CheckpointError."""
        self._tower = await loaded(load_denoiser_tower, self._topology)

    async def listen(self, token: str) -> str:
        """Starts the engine on the loaded tower and waits for its link; returns `host:port`."""
        assert self._tower is not None, "load comes first"
        options = self._topology.engine_options()
        pool = options.pool_for(self._tower)
        engine = DenoiserEngine(self._tower, options, pool=pool, threaded=True)
        await asyncio.to_thread(engine.warm_up)
        limit = max_update_bytes(self._tower.config, self._topology.max_context)
        transport = self._topology.transport
        receiver = StateReceiver(
            engine.receive,
            engine.follow,
            token,
            limit,
            transport=transport,
            device=self._tower.device if transport == "nccl" else CPU,
        )
        # The node's own address: on one machine that is still not open to every interface.
        address = await receiver.start(ray.util.get_node_ip_address())
        self._running = engine, receiver
        return address

    async def open(self, row_id: str, capacity: int) -> None:
        engine, receiver = self._parts()
        await engine.open(row_id, capacity)
        receiver.open(row_id)

    async def denoise_block(
        self,
        row_id: str,
        position: int,
        params: GenerationParams,
        known: Sequence[int] = (),
    ) -> Block:
        return await self._parts()[0].denoise_block(row_id, position, params, known)

    async def next_token(
        self, row_id: str, position: int, last_token: int, params: GenerationParams
    ) -> Block:
        return await self._parts()[0].next_token(row_id, position, last_token, params)

    async def release(self, row_id: str) -> None:
        engine, receiver = self._parts()
        receiver.forget(row_id)
        await engine.release(row_id)

    async def stats(self) -> dict[str, float]:
        """The engine's counters, and `mirrors`: rows that the link follows."""
        engine, receiver = self._parts()
        return {**engine.stats(), "mirrors": float(receiver.num_rows)}

    async def check(self) -> None:
        """Raises UnavailableError if the tower is not loaded or hangs."""
        self._parts()[0].check_progress(self._topology.stall_timeout_s)

    async def close(self) -> None:
        """Stops to listen for the link."""
        if self._running is not None:
            await self._running[1].stop()

    def _parts(self) -> tuple[DenoiserEngine, StateReceiver]:
        if self._running is None:
            raise UnavailableError("the denoiser tower is not loaded")
        return self._running
