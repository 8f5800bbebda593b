"""Actors that answer the calls of a tower by an engine in their process."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any, Generic, TypeVar, get_args

import ray

from twotower.cluster.calls.server import CallServer, Target
from twotower.cluster.calls.stream import CallAddress
from twotower.cluster.channel.faults import FaultyLink
from twotower.cluster.channel.grpc import CPU, GrpcStateLink, LinkSpec
from twotower.cluster.channel.link_fan import LinkFan
from twotower.cluster.channel.receiver import StateReceiver
from twotower.cluster.channel.self_test import LinkTestError
from twotower.cluster.channel.tls import new_identity
from twotower.cluster.channel.transfers import Transfers
from twotower.cluster.services.loading import loaded, place_of
from twotower.cluster.services.tower_services import (
    ROW_CALLS,
    Call,
    ContextTowerService,
    DenoiserTowerService,
    P,
    Side,
    T,
    TowerService,
    bound,
)
from twotower.cluster.topology import GroupFault, PairTopology, Transport, max_update_bytes
from twotower.towers.checkpoint.weights import load_context_tower, load_denoiser_tower
from twotower.towers.engine.context_engine import ContextEngine
from twotower.towers.engine.denoiser_engine import DenoiserEngine
from twotower.towers.engine.engine import Engine
from twotower.towers.engine.stats import EngineStats
from twotower.towers.errors import UnavailableError
from twotower.towers.model.denoiser_tower import DenoiserTower

E = TypeVar("E", bound=Engine[Any, Any, Any])


class EngineService(TowerService, Generic[E]):
    """A tower with an engine in this process; `start_towers` makes it a Ray actor.

    Loading is a separate call, so that a faulty checkpoint reaches the pair as the error that it
    is and not as a dead actor.
    """

    name: Side

    def __init__(self, topology: PairTopology) -> None:
        self._topology = topology
        self._engine: E | None = None
        self._answering: CallServer | None = None

    async def answer_calls(self) -> CallAddress:
        """Starts to answer calls of rows over gRPC; returns where."""
        self._answering = call_server(self._topology, lambda _side: self)
        return await self._answering.start(ray.util.get_node_ip_address())

    def run(self, engine: E) -> None:
        """Answers calls by this engine from now on."""
        self._engine = engine

    @property
    def engine(self) -> E:
        """The loaded tower's engine. Raises UnavailableError before that."""
        if self._engine is None:
            raise UnavailableError(f"the {self.name} tower is not loaded")
        return self._engine

    async def close(self) -> None:
        """Stops to answer calls of rows."""
        if self._answering is not None:
            await self._answering.stop()

    async def stats(self) -> EngineStats:
        return self.engine.stats()

    async def check(self) -> None:
        """Raises UnavailableError if the tower is not loaded or hangs."""
        self.engine.check_progress(self._topology.stall_timeout_s)

    async def _call(self, call: Call[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await bound(self.engine, call)(*args, **kwargs)


class ContextTowerActor(EngineService[ContextEngine], ContextTowerService):
    """Runs a ContextEngine and publishes its rows' states over links to the denoiser towers."""

    name = "context"

    def __init__(self, topology: PairTopology) -> None:
        super().__init__(topology)
        self._links = LinkFan()
        self._transfers = Transfers()
        self._disturbed: set[int] = set()

    async def load(self) -> None:
        """Loads the tower and starts its engine. Raises CheckpointError, ConfigError,
        DeviceError."""
        tower = await loaded(load_context_tower, self._topology)
        options = self._topology.engine
        link = None if self._topology.placement == "ar_only" else self._links
        engine = ContextEngine(tower, link, options, threaded=True)
        await asyncio.to_thread(engine.warm_up)
        self.run(engine)

    async def connect(self, denoiser: int, link: LinkSpec) -> None:
        """Links the tower to a denoiser tower; the link to it that was there ends.

        Raises LinkTestError if the link's transport is not gRPC and fails its self-test."""
        faults = self._topology.faults if denoiser not in self._disturbed else None
        self._disturbed.add(denoiser)
        state_link = self._link(link, faults.group if faults is not None else None)
        if link.transport != "grpc":
            await self._prove(state_link, denoiser, link)
        disturbed = FaultyLink(state_link, faults) if faults is not None else state_link
        await self._links.connect(denoiser, disturbed)

    def _link(self, spec: LinkSpec, fault: GroupFault | None) -> GrpcStateLink:
        tower = self.engine.tower
        return GrpcStateLink(
            spec,
            tower.config,
            tower.dtype,
            tower.replay_tensors(),
            device=tower.device if spec.transport == "nccl" else CPU,
            transfers=self._transfers,
            fault=fault,
        )

    async def _prove(self, link: GrpcStateLink, denoiser: int, spec: LinkSpec) -> None:
        """Lets a link carry known updates; ends it and raises LinkTestError if it does not."""
        try:
            await link.self_test()
        except UnavailableError as error:
            await link.close()
            place = place_of(self.engine.tower.device)
            raise LinkTestError(
                f"transport {spec.transport} does not carry states from the context tower "
                f"({place}) to denoiser tower {denoiser} ({spec.place}): {error}"
            ) from None
        except BaseException:
            await link.close()
            raise

    async def open_for(self, row_id: str, capacity: int, denoiser: int) -> int:
        self._links.assign(row_id, denoiser)
        try:
            return await self.open(row_id, capacity)
        except BaseException:
            self._links.forget(row_id)
            raise

    async def move(self, row_id: str, denoiser: int) -> None:
        await self.engine.reseed(row_id, lambda: self._links.move(row_id, denoiser))

    async def broken_links(self) -> list[int]:
        return self._links.broken()

    async def stats(self) -> EngineStats:
        """The engine's counters, and links by transport with what they have carried, if there are
        any."""
        stats, carried = await super().stats(), self._transfers
        if not self._links.connected:
            return stats
        links = self._links.transports()
        return replace(
            stats,
            **{f"{transport}_links": links[transport] for transport in get_args(Transport)},
            transfers=carried.updates,
            transfer_bytes=carried.num_bytes,
            transfer_seconds=carried.nanoseconds / 1e9,
        )

    async def close(self) -> None:
        """Closes every link, and stops to answer calls."""
        await self._links.close()
        await super().close()


class DenoiserTowerActor(EngineService[DenoiserEngine], DenoiserTowerService):
    """Runs a DenoiserEngine and receives its mirrors' states over a link."""

    name = "denoiser"

    def __init__(self, topology: PairTopology) -> None:
        super().__init__(topology)
        self._tower: DenoiserTower | None = None
        self._receiver: StateReceiver | None = None

    async def load(self) -> None:
        """Loads the tower. Raises CheckpointError, DeviceError."""
        self._tower = await loaded(load_denoiser_tower, self._topology)

    async def listen(self, token: str) -> LinkSpec:
        """Starts the engine on the loaded tower and waits for its link; returns what the link
        needs, as epoch 0."""
        assert self._tower is not None, "load comes first"
        options = self._topology.engine
        pool = options.pool_for(self._tower)
        engine = DenoiserEngine(self._tower, options, pool=pool, threaded=True)
        await asyncio.to_thread(engine.warm_up)
        transport = self._topology.transport
        # Made here: the private key is in no message.
        identity = new_identity() if self._topology.channel_tls else None
        receiver = StateReceiver(
            engine.receive,
            engine.follow,
            token,
            max_update_bytes(self._tower.config, self._topology.engine.max_context),
            transport=transport,
            device=self._tower.device if transport == "nccl" else CPU,
            identity=identity,
        )
        # The address of the node: on one machine that is still not open to every interface.
        address = await receiver.start(ray.util.get_node_ip_address())
        self._receiver = receiver
        self.run(engine)
        certificate = None if identity is None else identity.certificate
        return LinkSpec(address, token, 0, transport, certificate, place_of(self._tower.device))

    async def open(self, row_id: str, capacity: int) -> None:
        await super().open(row_id, capacity)
        if self._receiver is not None:
            self._receiver.open(row_id)

    async def release(self, row_id: str) -> None:
        if self._receiver is not None:
            self._receiver.forget(row_id)
        await super().release(row_id)

    async def stats(self) -> EngineStats:
        """The engine's counters, and the number of rows that the link follows."""
        stats = await super().stats()
        return stats if self._receiver is None else replace(stats, mirrors=self._receiver.num_rows)

    async def close(self) -> None:
        """Stops to listen for the link, and to answer calls."""
        if self._receiver is not None:
            await self._receiver.stop()
        await super().close()


def call_server(topology: PairTopology, target: Target) -> CallServer:
    """A server of calls of rows, over TLS if the pair's links are."""
    # Made here: the private key is in no message.
    return CallServer(target, ROW_CALLS, new_identity() if topology.channel_tls else None)
