"""Threads of a tower's process, and loading beside its event loop."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from twotower.cluster.topology import PairTopology
from twotower.kernels.quantized import ExpertProducts
from twotower.towers.checkpoint.weights import parse_dtype
from twotower.towers.limits import usable_cpus

# A pass's thread and the event loop share the interpreter: calls and updates of other rows should
# not wait for it as long as a small pass takes.
SWITCH_INTERVAL_S = 0.0005
T = TypeVar("T", covariant=True)


class TowerLoad(Protocol[T]):
    """Loads one of the towers, as `load_context_tower` does."""

    def __call__(
        self,
        folder: Path,
        device: str | torch.device,
        dtype: torch.dtype,
        *,
        deterministic: bool,
        expert_products: ExpertProducts,
    ) -> T: ...


def prepare_process(topology: PairTopology) -> None:
    """Sets torch's threads and Python's switch interval."""
    # Here and not where the service is described: hosts differ, and so do their limits.
    torch.set_num_threads(topology.num_threads or max(1, usable_cpus() // 2))
    sys.setswitchinterval(SWITCH_INTERVAL_S)


async def loaded(load: TowerLoad[T], topology: PairTopology) -> T:
    """A tower by `load` in a thread. Raises CheckpointError, ConfigError."""
    prepare_process(topology)
    return await asyncio.to_thread(
        load,
        Path(topology.model_path),
        topology.device,
        parse_dtype(topology.dtype),
        deterministic=topology.deterministic,
        expert_products=topology.expert_products,
    )
