"""One engine per Ray actor: the classes that run inside, and how a pair of them is started.

The classes are plain; `start_towers` wraps them. Loading happens in `start`, so that a faulty
checkpoint reaches the pair as the error it is and not as a dead actor.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray
import torch
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from twotower.cluster.channel.grpc import CPU, GrpcStateLink, LinkSpec
from twotower.cluster.channel.receiver import StateReceiver
from twotower.cluster.remote import PairServices, RemoteContext, RemoteDenoiser
from twotower.cluster.topology import (
    CONTEXT_BUNDLE,
    DENOISER_BUNDLE,
    PairTopology,
    max_update_bytes,
)
from twotower.towers.context import ContextTower
from twotower.towers.context_engine import ContextEngine
from twotower.towers.denoiser import DenoiserTower
from twotower.towers.denoiser_engine import DenoiserEngine
from twotower.towers.errors import UnavailableError
from twotower.towers.params import GenerationParams
from twotower.towers.protocols import Block, Prefilled
from twotower.towers.weights import load_context_tower, load_denoiser_tower, parse_dtype

logger = logging.getLogger(__name__)

# A pass's thread and the event loop share the interpreter: calls and updates of other rows should
# not wait for it as long as a small pass takes.
SWITCH_INTERVAL_S = 0.0005
T = TypeVar("T")


class ContextTowerActor:
    """Runs a ContextEngine and publishes its rows' states over a link."""

    def __init__(self, topology: PairTopology) -> None:
        self._topology = topology
        self._tower: ContextTower | None = None
        self._running: tuple[ContextEngine, GrpcStateLink] | None = None

    async def load(self) -> None:
        """Loads the tower. Raises CheckpointError."""
        self._tower = await _loaded(load_context_tower, self._topology)

    async def connect(self, link: LinkSpec) -> None:
        """Starts the engine on the loaded tower, with a link to its denoiser tower."""
        assert self._tower is not None, "load comes first"
        tower = self._tower
        state_link = GrpcStateLink(
            link,
            tower.config,
            tower.dtype,
            tower.replay_tensors(),
            device=tower.device if link.transport == "nccl" else CPU,
        )
        options = self._topology.engine_options()
        engine = ContextEngine.with_options(tower, state_link, options, threaded=True)
        await asyncio.to_thread(engine.warm_up)
        self._running = engine, state_link

    async def open(self, row_id: str, capacity: int) -> None:
        await self._parts()[0].open(row_id, capacity)

    async def prefill(
        self, row_id: str, prompt: Sequence[int], generated: Sequence[int], params: GenerationParams
    ) -> Prefilled:
        return await self._parts()[0].prefill(row_id, prompt, generated, params)

    async def extend(self, row_id: str, token_ids: Sequence[int]) -> int:
        return await self._parts()[0].extend(row_id, token_ids)

    async def decode(self, row_id: str, count: int, params: GenerationParams) -> Block:
        return await self._parts()[0].decode(row_id, count, params)

    async def verify(self, row_id: str, draft: Sequence[int], params: GenerationParams) -> Block:
        return await self._parts()[0].verify(row_id, draft, params)

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        return await self._parts()[0].score(token_ids)

    async def release(self, row_id: str) -> None:
        await self._parts()[0].release(row_id)

    async def stats(self) -> dict[str, float]:
        """The engine's counters."""
        return self._parts()[0].stats()

    async def check(self) -> None:
        """Raises UnavailableError if the tower is not loaded or its link is broken."""
        self._parts()[1].check()

    async def close(self) -> None:
        """Ends the link."""
        if self._running is not None:
            await self._running[1].close()

    def _parts(self) -> tuple[ContextEngine, GrpcStateLink]:
        if self._running is None:
            raise UnavailableError("the context tower is not loaded")
        return self._running


class DenoiserTowerActor:
    """Runs a DenoiserEngine and receives its mirrors' states over a link."""

    def __init__(self, topology: PairTopology) -> None:
        self._topology = topology
        self._tower: DenoiserTower | None = None
        self._running: tuple[DenoiserEngine, StateReceiver] | None = None

    async def load(self) -> None:
        """Loads the tower. Raises CheckpointError."""
        self._tower = await _loaded(load_denoiser_tower, self._topology)

    async def listen(self, token: str) -> str:
        """Starts the engine on the loaded tower and waits for its link; returns `host:port`."""
        assert self._tower is not None, "load comes first"
        options = self._topology.engine_options()
        pool = options.pool_for(self._tower)
        engine = DenoiserEngine(self._tower, pool=pool, limits=options.limits, threaded=True)
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
        """Raises UnavailableError if the tower is not loaded."""
        self._parts()

    async def close(self) -> None:
        """Stops to listen for the link."""
        if self._running is not None:
            await self._running[1].stop()

    def _parts(self) -> tuple[DenoiserEngine, StateReceiver]:
        if self._running is None:
            raise UnavailableError("the denoiser tower is not loaded")
        return self._running


async def start_towers(topology: PairTopology) -> PairServices:
    """Starts both actors in the caller's placement group and links them.

    Raises CheckpointError if a tower does not load.
    """
    group = ray.util.get_current_placement_group()
    denoiser_actor = _actor(DenoiserTowerActor, topology, group, DENOISER_BUNDLE)
    context_actor = _actor(ContextTowerActor, topology, group, CONTEXT_BUNDLE)
    context, denoiser = RemoteContext(context_actor), RemoteDenoiser(denoiser_actor)
    token = secrets.token_hex(16)
    await asyncio.gather(context.load(), denoiser.load())
    address = await denoiser.listen(token)
    await context.connect(LinkSpec(address, token, 1, topology.transport))
    logger.info("both towers are loaded")
    return PairServices(context, denoiser)


async def _loaded(load: Callable[[Path, str, torch.dtype], T], topology: PairTopology) -> T:
    torch.set_num_threads(topology.num_threads)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    dtype = parse_dtype(topology.dtype)
    return await asyncio.to_thread(load, Path(topology.model_path), topology.device, dtype)


def _actor(kind: type, topology: PairTopology, group: PlacementGroup | None, bundle: int) -> Any:
    options: dict[str, Any] = {
        "num_cpus": topology.cpus,
        "num_gpus": topology.gpus,
        "max_concurrency": topology.max_concurrency(),
        # A tower that died has lost its rows and its link; the pair is replaced as a whole.
        "max_restarts": 0,
    }
    if group is not None:
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
            group, placement_group_bundle_index=bundle
        )
    return ray.remote(kind).options(**options).remote(topology)
