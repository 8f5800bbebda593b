"""Both towers of a pair in one process, on one device: states are shared, nothing is sent."""

from __future__ import annotations

import asyncio
import inspect
from pathlib import Path
from typing import Any, Literal

from twotower.cluster.actors.loading import prepare_process
from twotower.cluster.topology import PairTopology
from twotower.towers.checkpoint.weights import parse_dtype
from twotower.towers.engine.context_engine import ContextEngine
from twotower.towers.engine.denoiser_engine import DenoiserEngine
from twotower.towers.engine.engine import Engine
from twotower.towers.engine.load import load_engines
from twotower.towers.errors import UnavailableError

Side = Literal["context", "denoiser"]


class ColocatedActor:
    """Runs both engines; what a pair asks of one of them comes through `call`."""

    def __init__(self, topology: PairTopology) -> None:
        self._topology = topology
        self._engines: tuple[ContextEngine, DenoiserEngine] | None = None

    async def load(self) -> None:
        """Loads both towers. Raises CheckpointError, ConfigError."""
        topology = self._topology
        prepare_process(topology)
        self._engines = await asyncio.to_thread(self._load_engines)

    async def call(self, side: Side, name: str, *args: Any) -> Any:
        """Calls a method of one side's engine."""
        engine = self._engine(side)
        if name == "check":
            return engine.check_progress(self._topology.stall_timeout_s)
        result = getattr(engine, name)(*args)
        return await result if inspect.isawaitable(result) else result

    def _load_engines(self) -> tuple[ContextEngine, DenoiserEngine]:
        topology = self._topology
        context, denoiser = load_engines(
            Path(topology.model_path),
            topology.device,
            topology.device,
            parse_dtype(topology.dtype),
            options=topology.engine_options(),
            threaded=True,
        )
        context.warm_up()
        denoiser.warm_up(pool=context.pool)
        return context, denoiser

    def _engine(self, side: Side) -> Engine[Any, Any, Any]:
        if self._engines is None:
            raise UnavailableError("the towers are not loaded")
        return self._engines[0] if side == "context" else self._engines[1]


class SideHandle:
    """One side of a ColocatedActor's handle, called like an actor of its own."""

    def __init__(self, actor: Any, side: Side) -> None:
        self._actor = actor
        self._side = side

    def __getattr__(self, name: str) -> _Method:
        return _Method(self._actor, self._side, name)


class _Method:
    def __init__(self, actor: Any, side: Side, name: str) -> None:
        self._actor = actor
        self._side = side
        self._name = name

    def remote(self, *args: Any) -> Any:
        """As of an actor's method."""
        return self._actor.call.remote(self._side, self._name, *args)
