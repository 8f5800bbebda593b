"""Both towers of a pair in one process, on one device: states are shared, nothing is sent."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import ray
import torch

from twotower.cluster.calls.server import CallServer
from twotower.cluster.calls.stream import CallAddress
from twotower.cluster.services.actors import ContextTowerActor, DenoiserTowerActor, call_server
from twotower.cluster.services.loading import loaded
from twotower.cluster.services.tower_services import Call, Side, StreamCall, TowerService, bound
from twotower.cluster.topology import PairTopology
from twotower.kernels.quantized import ExpertProducts
from twotower.towers.engine.context_engine import ContextEngine
from twotower.towers.engine.denoiser_engine import DenoiserEngine
from twotower.towers.engine.load import load_engines


class ColocatedActor:
    """Runs both engines; a proxy's task for either tower comes through `call`."""

    def __init__(self, topology: PairTopology) -> None:
        self._topology = topology
        self._context = ContextTowerActor(topology)
        self._denoiser = DenoiserTowerActor(topology)
        self._towers: dict[str | None, TowerService] = {
            "context": self._context,
            "denoiser": self._denoiser,
        }
        self._answering: CallServer | None = None

    async def load(self) -> None:
        """Loads both towers. Raises CheckpointError, ConfigError, DeviceError."""
        context, denoiser = await loaded(self._load_engines, self._topology)
        self._context.run(context)
        self._denoiser.run(denoiser)

    async def call(self, side: Side, call: Call[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Makes a call of one of the towers. Raises UnavailableError before they are loaded."""
        return await bound(self._towers[side], call)(*args, **kwargs)

    async def answer_calls(self) -> CallAddress:
        """Starts to answer calls of rows of both towers over gRPC; returns where."""
        self._answering = call_server(self._topology, self._towers.__getitem__)
        return await self._answering.start(ray.util.get_node_ip_address())

    async def close(self) -> None:
        """Stops to answer calls."""
        if self._answering is not None:
            await self._answering.stop()

    async def stream(
        self, side: Side, call: StreamCall[..., Any], *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        """As `call`, for a call that answers by a stream."""
        answers = getattr(self._towers[side], call.__name__)(*args, **kwargs)
        async with aclosing(answers):
            async for answer in answers:
                yield answer

    def _load_engines(
        self,
        folder: Path,
        device: str | torch.device,
        dtype: torch.dtype,
        *,
        deterministic: bool,
        expert_products: ExpertProducts,
    ) -> tuple[ContextEngine, DenoiserEngine]:
        options = self._topology.engine
        context, denoiser = load_engines(
            folder,
            device,
            device,
            dtype,
            options=options,
            deterministic=deterministic,
            threaded=True,
            expert_products=expert_products,
        )
        context.warm_up()
        denoiser.warm_up(pool=context.pool)
        return context, denoiser
