"""Starts the towers of a pair as Ray actors in the caller's placement group."""

from __future__ import annotations

import asyncio
import logging
import secrets
from dataclasses import replace
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from twotower.cluster.channel.grpc import LinkSpec
from twotower.cluster.channel.self_test import LinkTestError
from twotower.cluster.services.actors import ContextTowerActor, DenoiserTowerActor
from twotower.cluster.services.colocated import ColocatedActor
from twotower.cluster.services.pair_towers import PairTowers
from twotower.cluster.services.remote import RemoteContext, RemoteDenoiser
from twotower.cluster.services.tower_services import PairServices
from twotower.cluster.topology import CONTEXT_BUNDLE, DENOISER_BUNDLE, PairTopology

logger = logging.getLogger(__name__)


async def start_towers(topology: PairTopology) -> PairServices:
    """Starts the actors of a pair and links them.

    Raises CheckpointError if a tower does not load, ConfigError if it has no room, DeviceError if
    its device fails the self-test.
    """
    group = ray.util.get_current_placement_group()
    if topology.placement == "colocated":
        return await _start_colocated(topology, group)
    context = RemoteContext(_actor(ContextTowerActor, topology, group, CONTEXT_BUNDLE))
    if topology.placement == "ar_only":
        await context.load()
        return PairServices(context, None)
    keeper = _Keeper(topology, group, context)
    places = range(topology.denoisers_per_context)
    await asyncio.gather(context.load(), *(keeper.load(index) for index in places))
    denoisers = await asyncio.gather(*(keeper.link(index) for index in places))
    logger.info("the towers are loaded and linked")
    pair = PairTowers(
        context,
        denoisers,
        keeper.start,
        keeper.relink,
        repair_timeout_s=topology.repair_timeout_s,
    )
    return PairServices(pair.context, pair.denoiser)


async def _start_colocated(topology: PairTopology, group: PlacementGroup | None) -> PairServices:
    actor = _actor(ColocatedActor, topology, group, CONTEXT_BUNDLE)
    context = RemoteContext(actor, "context")
    # The actor loads both towers at once.
    await context.load()
    return PairServices(context, RemoteDenoiser(actor, "denoiser", context.calls))


class _Keeper:
    """Starts denoiser towers as Ray actors and links them to the context tower.

    A denoiser has one token for its life, and with `channel_tls` one certificate, which it makes
    itself. Each of its links has an epoch: the receiver passes over what an older link may still
    send. Where the transport fails its self-test, the place's links are gRPC for the pair's life.
    """

    def __init__(
        self, topology: PairTopology, group: PlacementGroup | None, context: RemoteContext
    ) -> None:
        self._topology = topology
        self._group = group
        self._context = context
        self._actors: dict[int, Any] = {}
        self._towers: dict[int, RemoteDenoiser] = {}
        self._links: dict[int, LinkSpec] = {}
        self._epoch = 0

    async def start(self, index: int) -> RemoteDenoiser:
        """A new tower in place `index`, linked; the actor that was there is killed first."""
        old = self._actors.pop(index, None)
        if old is not None:
            ray.kill(old, no_restart=True)
            await self._towers.pop(index).close()
        await self.load(index)
        return await self.link(index)

    async def load(self, index: int) -> None:
        """Starts the actor in a place and loads its tower."""
        bundle = DENOISER_BUNDLE + index
        actor = _actor(DenoiserTowerActor, self._topology, self._group, bundle)
        self._actors[index], self._towers[index] = actor, RemoteDenoiser(actor)
        await self._towers[index].load()

    async def link(self, index: int) -> RemoteDenoiser:
        """Links the loaded tower in place `index` to the context tower."""
        token = secrets.token_hex(16)
        listened = await self._towers[index].listen(token)
        # Where a group hangs its self-test takes minutes: what has failed is not tried again.
        last = self._links.get(index, listened)
        self._links[index] = replace(listened, transport=last.transport)
        await self.relink(index)
        return self._towers[index]

    async def relink(self, index: int) -> None:
        """A new link to the tower in place `index`, which is alive."""
        try:
            await self._connect(index)
        except LinkTestError as error:
            logger.warning("%s; its states go over gRPC", error)
            self._links[index] = replace(self._links[index], transport="grpc")
            await self._connect(index)

    async def _connect(self, index: int) -> None:
        self._epoch += 1
        await self._context.connect(index, replace(self._links[index], epoch=self._epoch))


def _actor(kind: type, topology: PairTopology, group: PlacementGroup | None, bundle: int) -> Any:
    options: dict[str, Any] = {
        "num_cpus": topology.cpus_per_tower,
        "num_gpus": topology.gpus_per_tower,
        "max_concurrency": topology.max_concurrency(),
        # A tower that died has lost its rows and its links: the pair starts another.
        "max_restarts": 0,
    }
    if group is not None:
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
            group, placement_group_bundle_index=bundle
        )
    return ray.remote(kind).options(**options).remote(topology)
