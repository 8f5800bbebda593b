"""Threads of a tower's process, and loading beside its event loop."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Protocol, TypeVar

import ray
import torch

from twotower.cluster.topology import PairTopology
from twotower.kernels.quantized import ExpertProducts
from twotower.towers.checkpoint.weights import parse_dtype
from twotower.towers.limits import usable_cpus
from twotower.towers.verify import prove_device

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


def place_of(device: torch.device) -> str:
    """Where a tower of this process is, in an operator's words: its node and its GPU, or the CPU.
    A GPU's number is that of the node, whatever the process calls it."""
    node = f"node {ray.util.get_node_ip_address()}"
    if device.type != "cuda":
        return f"{node}, CPU"
    numbers = ",".join(map(str, ray.get_gpu_ids())) or str(device.index or 0)
    return f"{node}, GPU {numbers}, {torch.cuda.get_device_name(device)}"


async def loaded(load: TowerLoad[T], topology: PairTopology) -> T:
    """A tower by `load` in a thread, on a device that has passed its self-test. Raises
    CheckpointError, ConfigError, DeviceError."""
    prepare_process(topology)
    place = Path(topology.model_path), topology.device, parse_dtype(topology.dtype)
    products, steady = topology.expert_products, topology.deterministic
    # Before the weights: a device that fails is not filled first.
    await asyncio.to_thread(prove_device, *place, topology.self_test, products, steady)
    return await asyncio.to_thread(load, *place, deterministic=steady, expert_products=products)
