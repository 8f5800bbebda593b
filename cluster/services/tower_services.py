"""The calls of the towers of a pair: the proxies that make them, and the actors that answer.

A call is a method of ContextTowerService or DenoiserTowerService, written once, which hands itself
to `_call`: for a proxy this is a remote call of its actor, for an actor a call of its engine. A
subclass overrides only the calls to which it adds something.
"""

from __future__ import annotations

import asyncio
import contextvars
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Concatenate, Generic, Literal, ParamSpec, TypeVar, get_args

import ray

from twotower.cluster.channel.faults import FaultyLink
from twotower.cluster.channel.grpc import CPU, GrpcStateLink, LinkSpec
from twotower.cluster.channel.link_fan import LinkFan
from twotower.cluster.channel.receiver import StateReceiver
from twotower.cluster.channel.self_test import LinkTestError
from twotower.cluster.channel.tls import new_identity
from twotower.cluster.channel.transfers import Transfers
from twotower.cluster.services.loading import loaded, place_of
from twotower.cluster.services.ray_errors import detached, plainly
from twotower.cluster.services.watch import Watch
from twotower.cluster.topology import GroupFault, PairTopology, Transport, max_update_bytes
from twotower.towers.checkpoint.weights import load_context_tower, load_denoiser_tower
from twotower.towers.decoding.provisional import Drafting
from twotower.towers.decoding.services import (
    UNKNOWN_COSTS,
    Block,
    DraftCosts,
    DraftScores,
    Extended,
    Prefilled,
    ProvisionalBlock,
    Scores,
    Watcher,
)
from twotower.towers.engine.context_engine import ContextEngine
from twotower.towers.engine.denoiser_engine import DenoiserEngine
from twotower.towers.engine.engine import Engine
from twotower.towers.engine.stats import EngineStats
from twotower.towers.errors import UnavailableError
from twotower.towers.model.denoiser_tower import DenoiserTower
from twotower.towers.request.params import GenerationParams

# A draft costs a message on each hop to the client, whatever a pass takes.
DRAFT_PERIOD_S = 0.15
P = ParamSpec("P")
T = TypeVar("T")
E = TypeVar("E", bound=Engine[Any, Any, Any])
# A call of a service: its method, not bound to an object.
Call = Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]
# As well, answered by a stream.
StreamCall = Callable[Concatenate[Any, P], AsyncGenerator[T, None]]
Side = Literal["context", "denoiser"]


def bound(target: object, call: Call[P, T]) -> Callable[P, Coroutine[Any, Any, T]]:
    """The method of `target` that has the name and the types of `call`."""
    method: Callable[P, Coroutine[Any, Any, T]] = getattr(target, call.__name__)
    return method


class TowerService(ABC):
    """A tower that holds rows; guarantees as in `towers/decoding/services.py`."""

    @abstractmethod
    async def _call(self, call: Call[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Makes a call where the tower is."""

    async def release(self, row_id: str) -> None:
        """Frees everything that the row holds, or its place in the queue."""
        await self._call(TowerService.release, row_id)

    async def stats(self) -> EngineStats:
        """Counters of the tower's engine."""
        return await self._call(TowerService.stats)

    async def check(self) -> None:
        """Raises UnavailableError if the tower cannot serve."""
        await self._call(TowerService.check)


class ContextTowerService(TowerService):
    """A context tower with links to denoiser towers; fulfils `ContextService`."""

    async def open(self, row_id: str, capacity: int) -> int:
        """See `ContextService`; the row's state goes to denoiser tower 0."""
        return await self._call(ContextTowerService.open, row_id, capacity)

    async def open_for(self, row_id: str, capacity: int, denoiser: int) -> int:
        """As `open`; the row's state goes to denoiser tower number `denoiser`."""
        return await self._call(ContextTowerService.open_for, row_id, capacity, denoiser)

    async def move(self, row_id: str, denoiser: int) -> None:
        """Sends all of a row's state to a denoiser tower that has just opened the row, and every
        update from now on."""
        await self._call(ContextTowerService.move, row_id, denoiser)

    async def broken_links(self) -> list[int]:
        """Numbers of the denoiser towers whose links do not work any more."""
        return await self._call(ContextTowerService.broken_links)

    async def prefill(
        self, row_id: str, prompt: Sequence[int], generated: Sequence[int], params: GenerationParams
    ) -> Prefilled:
        """See `ContextService`."""
        return await self._call(ContextTowerService.prefill, row_id, prompt, generated, params)

    async def extend(
        self,
        row_id: str,
        token_ids: Sequence[int],
        params: GenerationParams,
        output: Sequence[int] = (),
    ) -> Extended:
        """See `ContextService`."""
        return await self._call(ContextTowerService.extend, row_id, token_ids, params, output)

    async def decode(
        self,
        row_id: str,
        count: int,
        params: GenerationParams,
        output: Sequence[int] = (),
        costs: DraftCosts = UNKNOWN_COSTS,
    ) -> Block:
        """See `ContextService`."""
        call = ContextTowerService.decode
        return await self._call(call, row_id, count, params, output, costs)

    async def update_mirror(self, row_id: str) -> None:
        """See `ContextService`."""
        await self._call(ContextTowerService.update_mirror, row_id)

    async def verify(
        self,
        row_id: str,
        draft: Sequence[int],
        params: GenerationParams,
        output: Sequence[int] = (),
        scores: DraftScores | None = None,
    ) -> Block:
        """See `ContextService`."""
        return await self._call(ContextTowerService.verify, row_id, draft, params, output, scores)

    async def score(self, token_ids: Sequence[int], top_logprobs: int = 0) -> Scores:
        """See `ContextService`."""
        return await self._call(ContextTowerService.score, token_ids, top_logprobs)


class DenoiserTowerService(TowerService):
    """A denoiser tower; fulfils `DenoiserService`."""

    async def open(self, row_id: str, capacity: int) -> None:
        """See `DenoiserService`."""
        await self._call(DenoiserTowerService.open, row_id, capacity)

    async def denoise_block(
        self,
        row_id: str,
        position: int,
        params: GenerationParams,
        known: Sequence[int] = (),
        output: Sequence[int] = (),
        watch: Watcher | None = None,
    ) -> Block:
        """See `DenoiserService`."""
        call = DenoiserTowerService.denoise_block
        return await self._call(call, row_id, position, params, known, output, watch)

    async def next_token(
        self,
        row_id: str,
        position: int,
        last_token: int,
        params: GenerationParams,
        output: Sequence[int] = (),
    ) -> Block:
        """See `DenoiserService`."""
        call = DenoiserTowerService.next_token
        return await self._call(call, row_id, position, last_token, params, output)

    async def watched_block(
        self,
        row_id: str,
        position: int,
        params: GenerationParams,
        known: Sequence[int],
        output: Sequence[int],
    ) -> AsyncGenerator[ProvisionalBlock | Block, None]:
        """Drafts of `denoise_block`, one every DRAFT_PERIOD_S at most, and last its block."""
        call = partial(self.denoise_block, row_id, position, params, known, output)
        drafts = Drafting(call, watched=True, period_s=DRAFT_PERIOD_S)
        async with aclosing(drafts) as drafting:
            async for draft in drafting:
                yield draft
            yield await drafting.block()


@dataclass(frozen=True)
class PairServices:
    """The towers of a pair, wherever they run; all denoisers as one, None if there is none."""

    context: ContextTowerService
    denoiser: DenoiserTowerService | None

    def by_name(self) -> dict[str, TowerService]:
        """The towers that there are, by name."""
        towers: dict[str, TowerService] = {"context": self.context}
        return towers if self.denoiser is None else {**towers, "denoiser": self.denoiser}


class _Remote(TowerService):
    """The proxy of an actor; `side` says which tower of a ColocatedActor."""

    def __init__(self, actor: Any, side: Side | None = None) -> None:
        self._actor = actor
        self._side = side
        self._ending: set[asyncio.Task[None]] = set()

    async def load(self) -> None:
        """Loads the tower. Raises CheckpointError, DeviceError."""
        await plainly(self._actor.load.remote())

    async def release(self, row_id: str) -> None:
        """Frees the row, even if the request that asks for it is cancelled."""
        await detached(lambda: self._call(TowerService.release, row_id))

    async def _opened(self, row_id: str, opening: Coroutine[Any, Any, T]) -> T:
        """Waits until a row is open. If this is cancelled, the row is released once that call has
        ended as well: Ray may run a release before the call that was sent ahead of it, and then
        nobody else knows of the row."""
        call = asyncio.ensure_future(opening)
        try:
            return await asyncio.shield(call)
        except asyncio.CancelledError:
            ending = asyncio.create_task(
                self._release_after(call, row_id), context=contextvars.Context()
            )
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)
            raise

    async def _release_after(self, call: asyncio.Future[T], row_id: str) -> None:
        await asyncio.gather(call, return_exceptions=True)
        # A tower that is gone has nothing to release.
        await asyncio.gather(self.release(row_id), return_exceptions=True)

    async def _call(self, call: Call[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        if self._side is not None:
            sent = self._actor.call.remote(self._side, call, *args, **kwargs)
        else:
            sent = getattr(self._actor, call.__name__).remote(*args, **kwargs)
        answer: T = await plainly(sent)
        return answer

    async def _stream(
        self, call: StreamCall[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> AsyncGenerator[T, None]:
        """Makes a call that answers by a stream."""
        name = call.__name__ if self._side is None else "stream"
        method = getattr(self._actor, name).options(num_returns="streaming")
        head = () if self._side is None else (self._side, call)
        async for sent in method.remote(*head, *args, **kwargs):
            yield await plainly(sent)


class RemoteContext(_Remote, ContextTowerService):
    """A context tower in another process, which is ended if it hangs."""

    def __init__(self, actor: Any, side: Side | None = None) -> None:
        super().__init__(actor, side)
        self._watch = Watch(partial(ray.kill, actor))

    async def open(self, row_id: str, capacity: int) -> int:
        return await self._opened(row_id, super().open(row_id, capacity))

    async def open_for(self, row_id: str, capacity: int, denoiser: int) -> int:
        return await self._opened(row_id, super().open_for(row_id, capacity, denoiser))

    async def connect(self, denoiser: int, link: LinkSpec) -> None:
        """Links the tower to a denoiser tower, in place of the link to it that was there.

        Raises LinkTestError if the link's transport does not carry states."""
        await plainly(self._actor.connect.remote(denoiser, link))

    async def broken_links(self) -> list[int]:
        return await self._watch.answer(super().broken_links())

    async def stats(self) -> EngineStats:
        return await self._watch.answer(super().stats())

    async def check(self) -> None:
        await self._watch.answer(super().check())


class RemoteDenoiser(_Remote, DenoiserTowerService):
    """A denoiser tower in another process."""

    async def open(self, row_id: str, capacity: int) -> None:
        await self._opened(row_id, super().open(row_id, capacity))

    async def denoise_block(
        self,
        row_id: str,
        position: int,
        params: GenerationParams,
        known: Sequence[int] = (),
        output: Sequence[int] = (),
        watch: Watcher | None = None,
    ) -> Block:
        if watch is None:
            return await super().denoise_block(row_id, position, params, known, output)
        call = DenoiserTowerService.watched_block
        async with aclosing(self._stream(call, row_id, position, params, known, output)) as items:
            async for item in items:
                if isinstance(item, Block):
                    return item
                watch(item)
        raise UnavailableError("a stream of drafts ended without its block")

    async def listen(self, token: str) -> LinkSpec:
        """Starts the engine and waits for its link; returns what the link needs, as epoch 0."""
        link: LinkSpec = await plainly(self._actor.listen.remote(token))
        return link


class EngineService(TowerService, Generic[E]):
    """A tower with an engine in this process; `start_towers` makes it a Ray actor.

    Loading is a separate call, so that a faulty checkpoint reaches the pair as the error that it
    is and not as a dead actor.
    """

    name: Side

    def __init__(self, topology: PairTopology) -> None:
        self._topology = topology
        self._engine: E | None = None

    def run(self, engine: E) -> None:
        """Answers calls by this engine from now on."""
        self._engine = engine

    @property
    def engine(self) -> E:
        """The loaded tower's engine. Raises UnavailableError before that."""
        if self._engine is None:
            raise UnavailableError(f"the {self.name} tower is not loaded")
        return self._engine

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
        """Closes every link."""
        await self._links.close()


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
        """Stops to listen for the link."""
        if self._receiver is not None:
            await self._receiver.stop()
