"""Makes the pool of a tower's context states as large as free memory allows."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from twotower.towers.config.model_config import TwoTowerConfig
from twotower.towers.errors import ConfigError
from twotower.towers.limits import group_bytes
from twotower.towers.state.pages import pages_for
from twotower.towers.state.pool import StatePool
from twotower.towers.state.tensors import page_bytes, slot_bytes


def pool_for(
    config: TwoTowerConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    max_num_seqs: int,
    max_context: int | None,
    memory_fraction: float,
    reserved: int = 0,
) -> StatePool:
    """A pool of `max_num_seqs` slots, with pages for as many rows of `max_context` tokens (None:
    the model's limit) or for those that fit into `memory_fraction` of the memory that is free
    beside `reserved` bytes.

    Raises ConfigError if not one row of `max_context` tokens fits.
    """
    limit = int(memory_fraction * max(0, free_bytes(device) - reserved))
    num_pages = affordable_pages(config, max_num_seqs, max_context, limit, dtype)
    return StatePool(config, max_num_seqs, num_pages, device, dtype)


def affordable_pages(
    config: TwoTowerConfig,
    max_num_seqs: int,
    max_context: int | None,
    limit: int,
    dtype: torch.dtype,
) -> int:
    """Pages of a pool of at most `limit` bytes; raises as `pool_for`."""
    context = max_context or config.max_position_embeddings
    slots, page = max_num_seqs * slot_bytes(config, dtype), page_bytes(config, dtype)
    needed = slots + pages_for(context) * page
    if needed > limit:
        raise ConfigError(
            f"memory: got {limit} bytes for states, expected at least {needed}: {slots} for "
            f"max_num_seqs = {max_num_seqs} slots and {needed - slots} for the "
            f"{pages_for(context)} pages of one row of max_context = {context} tokens"
        )
    wanted = max_num_seqs * pages_for(context)
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
