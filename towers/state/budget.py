"""How much memory a tower's context states may take, and the pool that fits into it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from twotower.towers.config.model_config import TwoTowerConfig
from twotower.towers.errors import ConfigError
from twotower.towers.limits import group_bytes
from twotower.towers.state.pages import pages_for
from twotower.towers.state.pool import StatePool
from twotower.towers.state.tensors import page_bytes, slot_bytes

# What passes need on a GPU is reserved before; on a CPU, they and other programs need the rest.
_CUDA_FRACTION, _CPU_FRACTION = 0.95, 0.25


@dataclass(frozen=True)
class MemoryBudget:
    """How much a tower's states may take: rows at a time, tokens a row (None: what the model
    allows), and a share of the memory that weights and passes leave (None: 0.95 on CUDA, 0.25 on
    a CPU)."""

    max_num_seqs: int = 64
    max_context: int | None = None
    memory_fraction: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_context"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: got {value}, expected at least 1")
        if self.memory_fraction is not None and not 0.0 < self.memory_fraction <= 1.0:
            raise ConfigError(
                f"memory_fraction: got {self.memory_fraction}, expected above 0 and at most 1"
            )


def pool_for(
    config: TwoTowerConfig,
    budget: MemoryBudget,
    device: torch.device,
    dtype: torch.dtype,
    reserved: int = 0,
) -> StatePool:
    """A pool of `max_num_seqs` slots, with pages for as many rows of `max_context` tokens or for
    those that fit into the share of the memory that is free beside `reserved` bytes.

    Raises ConfigError if not one row of `max_context` tokens fits.
    """
    fraction = budget.memory_fraction
    if fraction is None:
        fraction = _CUDA_FRACTION if device.type == "cuda" else _CPU_FRACTION
    free = max(0, free_bytes(device) - reserved)
    num_pages = affordable_pages(config, budget, int(fraction * free), dtype)
    return StatePool(config, budget.max_num_seqs, num_pages, device, dtype)


def affordable_pages(
    config: TwoTowerConfig, budget: MemoryBudget, limit: int, dtype: torch.dtype
) -> int:
    """Pages of a pool of at most `limit` bytes; raises as `pool_for`."""
    rows, context = budget.max_num_seqs, budget.max_context or config.max_position_embeddings
    slots, page = rows * slot_bytes(config, dtype), page_bytes(config, dtype)
    needed = slots + pages_for(context) * page
    if needed > limit:
        raise ConfigError(
            f"memory: got {limit} bytes for states, expected at least {needed}: {slots} for "
            f"max_num_seqs = {rows} slots and {needed - slots} for the {pages_for(context)} pages "
            f"of one row of max_context = {context} tokens"
        )
    wanted = rows * pages_for(context)
    return min(wanted, (limit - slots) // page) if page else wanted


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device; on a CPU what the system and the control group leave."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(_system_bytes(), group_bytes())


def _system_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024
