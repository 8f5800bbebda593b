"""Towers that compute nothing: a pair's block loop, calls and processes without its passes.

Every block is the same tokens after a given time. The classes around these engines are those of
a service: TowerPair, PairServices, and ColocatedActor in a process of its own or the towers'
services in the pair's process.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from twotower.cluster.services.actors import ContextTowerActor, DenoiserTowerActor
from twotower.cluster.services.colocated import ColocatedActor
from twotower.cluster.services.remote import RemoteContext, RemoteDenoiser
from twotower.cluster.services.tower_services import PairServices
from twotower.cluster.topology import CONTEXT_BUNDLE, PairTopology
from twotower.towers.decoding.services import Block, Extended, Prefilled, Token, Watcher
from twotower.towers.engine.stats import EngineStats
from twotower.towers.request.params import GenerationParams

Where = Literal["actor", "pair"]
# Ids of the shipped model's vocabulary that are words or parts of them, and no special tokens.
FIRST_TOKEN = 300


class FixedEngine:
    """What both engines have: rows by name, and the counters that a pair reports."""

    def __init__(self, pass_s: float) -> None:
        self._pass_s = pass_s
        self._rows: set[str] = set()
        self._passes = self._tokens = 0

    async def open(self, row_id: str, capacity: int) -> int:
        """Opens a row; there is room for all."""
        del capacity
        self._rows.add(row_id)
        return 0

    async def release(self, row_id: str) -> None:
        """Forgets a row."""
        self._rows.discard(row_id)

    def check_progress(self, stall_timeout_s: float) -> None:
        """Nothing hangs here."""

    def stats(self) -> EngineStats:
        """Rows that are open, and passes so far."""
        return EngineStats(
            rows=len(self._rows),
            queued_rows=0,
            pending_work=0,
            passes=self._passes,
            pass_rows=self._passes,
            pass_tokens=self._tokens,
            prefill_tokens=0,
            pass_seconds=0.0,
            clock_seconds=time.monotonic(),
            busy_share=0.0,
        )

    async def _pass(self, tokens: int) -> None:
        self._passes += 1
        self._tokens += tokens
        if self._pass_s:
            await asyncio.sleep(self._pass_s)


class FixedContext(FixedEngine):
    """A context engine that reads nothing. Prompts and blocks of the denoiser take the given time,
    extensions none."""

    async def prefill(
        self, row_id: str, prompt: Sequence[int], generated: Sequence[int], params: GenerationParams
    ) -> Prefilled:
        """See `ContextService`."""
        del row_id, generated
        await self._pass(len(prompt))
        return Prefilled(1, first=_first(params))

    async def extend(
        self,
        row_id: str,
        token_ids: Sequence[int],
        params: GenerationParams,
        output: Sequence[int] = (),
    ) -> Extended:
        """See `ContextService`."""
        del row_id, token_ids, output
        return Extended(1, first=_first(params))

    async def update_mirror(self, row_id: str) -> None:
        """See `ContextService`."""


def _first(params: GenerationParams) -> Token | None:
    return Token(FIRST_TOKEN, 0.5, -0.6931) if params.starts_with_context else None


class FixedDenoiser(FixedEngine):
    """A denoiser engine whose blocks are all alike."""

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
        del row_id, known, output, watch
        size = params.block_size
        await self._pass(size)
        tokens = tuple(range(FIRST_TOKEN, FIRST_TOKEN + size))
        return Block(
            position, tokens, (0,) * size, (0.5,) * size, nfe=1, log_probs=(-0.6931,) * size
        )


class FixedTowers(ColocatedActor):
    """Both fixed engines in one actor."""

    def __init__(self, topology: PairTopology, pass_s: float) -> None:
        super().__init__(topology)
        self._pass_s = pass_s

    async def load(self) -> None:
        """Nothing is read."""
        self._context.run(FixedContext(self._pass_s))  # type: ignore[arg-type]
        self._denoiser.run(FixedDenoiser(self._pass_s))  # type: ignore[arg-type]


@dataclass(frozen=True)
class StartFixed:
    """Starts fixed towers in place of `start_towers`; `pass_s` seconds each block, in an actor or
    in the pair's process. Calls of an actor go over a stream, or each as a task of its own."""

    where: Where
    pass_s: float
    tasks: bool = False

    async def __call__(self, topology: PairTopology) -> PairServices:
        """The towers of a pair, in the caller's placement group."""
        if self.where == "pair":
            context, denoiser = ContextTowerActor(topology), DenoiserTowerActor(topology)
            context.run(FixedContext(self.pass_s))  # type: ignore[arg-type]
            denoiser.run(FixedDenoiser(self.pass_s))  # type: ignore[arg-type]
            return PairServices(context, denoiser)
        actor = self._actor(topology)
        remote = RemoteContext(actor, "context")
        await remote.load()
        if self.tasks:
            remote.calls = None
        return PairServices(remote, RemoteDenoiser(actor, "denoiser", remote.calls))

    def _actor(self, topology: PairTopology) -> Any:
        placed = partial(PlacementGroupSchedulingStrategy, ray.util.get_current_placement_group())
        kind = ray.remote(FixedTowers).options(
            num_cpus=topology.cpus_per_tower,
            max_concurrency=topology.max_concurrency(),
            scheduling_strategy=placed(placement_group_bundle_index=CONTEXT_BUNDLE),
        )
        return kind.remote(topology, self.pass_s)
