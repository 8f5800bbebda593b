"""Bytes that each GPU of a layout needs, by the same rules by which the service takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Literal

import torch

from twotower.towers.checkpoint.checkpoint import expert_matrices, scale_name, tensor_shapes
from twotower.towers.config.model_config import TwoTowerConfig
from twotower.towers.engine.options import EngineOptions
from twotower.towers.engine.pass_memory import working_bytes
from twotower.towers.state.pages import pages_for
from twotower.towers.state.tensors import page_bytes, slot_bytes

# CUDA's own context, kernels, graphs and NCCL's buffers; assumed, not measured.
RUNTIME_BYTES = 2 << 30
# As the service: states take at most this share of what weights and passes leave.
STATE_SHARE = 0.95
PREFIX_CACHE_BYTES = 256 << 20
_VALUE, _SCALE = 2, 4
Side = Literal["context", "denoiser"]


@dataclass(frozen=True)
class TowerBytes:
    """Weights of each tower with its head, and of the denoiser with its time conditioning."""

    context: int
    denoiser: int


@dataclass(frozen=True)
class GpuMemory:
    """What one GPU holds, in bytes: weights; states, K/V and logs of its rows; tensors of a pass;
    the runtime's own. `there` is its whole memory."""

    role: str
    rows: int
    weights: int
    states: int
    work: int
    runtime: int
    there: int

    @property
    def needed(self) -> int:
        """All parts together, and what must stay free beside the states."""
        spare = self.work + round(self.states * (1 / STATE_SHARE - 1))
        return self.weights + self.states + spare + self.runtime

    @property
    def fits(self) -> bool:
        return self.needed <= self.there

    def arithmetic(self) -> str:
        """The sum, for whoever is told that it does not fit."""
        spare = self.needed - self.weights - self.states - self.runtime
        return (
            f"{self.role} GPU: needs {self.needed} bytes ({self.weights} weights + {self.states} "
            f"states of {self.rows} rows + {spare} for passes + {self.runtime} runtime), "
            f"has {self.there}"
        )


@lru_cache
def tower_bytes(config: TwoTowerConfig, *, fp8: bool) -> TowerBytes:
    """Weights in bf16, routed experts in 8 bits with fp32 scales if `fp8`."""
    config = replace(config, quantized_experts=fp8)
    narrow = set(expert_matrices(config)) if fp8 else set()
    scales = {scale_name(name) for name in narrow}
    sums = {True: 0, False: 0}
    for name, shape in tensor_shapes(config).items():
        size = 1 if name in narrow else _SCALE if name in scales else _VALUE
        sums[name.startswith(("context_tower.", "context_lm_head."))] += prod(shape) * size
    return TowerBytes(sums[True], sums[False])


def row_bytes(config: TwoTowerConfig, tokens: int) -> int:
    """A row's slot and pages for so many tokens."""
    pages = pages_for(tokens) * page_bytes(config, torch.bfloat16)
    return slot_bytes(config, torch.bfloat16) + pages


def work_bytes(config: TwoTowerConfig, rows: int, block: int, side: Side) -> int:
    """What the service reserves for a tower's passes, with its limits of a pass."""
    limits, reads_prompts = EngineOptions().pass_limits("cuda"), side == "context"
    tokens = max(rows * block, limits.max_num_batched_tokens)
    tokens += limits.max_prefill_tokens if reads_prompts else 0
    return working_bytes(
        config, torch.bfloat16, tokens, rows, block=block, reads_prompts=reads_prompts
    )


def gpu_memory(
    role: str,
    config: TwoTowerConfig,
    weights: int,
    rows: int,
    context: int,
    block: int,
    there: int,
    *,
    sides: Sequence[Side],
) -> GpuMemory:
    """One GPU with `rows` rows of `context` tokens and the towers `sides`; one that reads prompts
    has logs and the prefix cache beside."""
    states = rows * row_bytes(config, context + block)
    if "context" in sides:
        states += PREFIX_CACHE_BYTES
    work = sum(work_bytes(config, rows, block, side) for side in sides)
    return GpuMemory(role, rows, weights, states, work, RUNTIME_BYTES, there)
