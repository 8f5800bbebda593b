"""Bytes that each GPU of a layout needs, by the same rules by which the service takes them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

import torch

from twotower.towers.checkpoint import expert_matrices, scale_name, tensor_shapes
from twotower.towers.config import MAMBA, TwoTowerConfig
from twotower.towers.memory import page_bytes, pages_for, slot_bytes
from twotower.towers.scheduler import PassLimits

# CUDA's own context, kernels, graphs and NCCL's buffers; assumed, not measured.
RUNTIME_BYTES = 2 << 30
# As the service: states take at most this share of what the weights leave.
STATE_SHARE = 0.9
PREFIX_CACHE_BYTES = 256 << 20
_VALUE, _SCALE = 2, 4


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
        spare = max(self.work, round(self.states * (1 / STATE_SHARE - 1)))
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


def log_bytes(config: TwoTowerConfig, tokens: int) -> int:
    """Raw projections of so many tokens, which a context tower keeps until it has advanced."""
    per_token = config.conv_dim + config.mamba_num_heads
    return len(config.layers_of(MAMBA)) * per_token * tokens * _VALUE


def work_bytes(config: TwoTowerConfig, rows: int, block: int) -> int:
    """Tensors of a pass at its widest, a MoE layer's, and the logits of all rows' blocks."""
    tokens = max(rows * block, PassLimits.for_device("cuda").max_tokens)
    picks, hidden = config.num_experts_per_tok, config.hidden_size
    expert = picks * (config.moe_intermediate_size + hidden)
    shared = config.moe_shared_expert_intermediate_size
    layer = tokens * (2 * hidden + expert + shared) * _VALUE
    return layer + rows * block * config.vocab_size * _VALUE


def gpu_memory(
    role: str,
    config: TwoTowerConfig,
    weights: int,
    rows: int,
    context: int,
    block: int,
    there: int,
    *,
    reads_prompts: bool,
) -> GpuMemory:
    """One GPU with `rows` rows of `context` tokens; one that reads prompts has logs and the prefix
    cache beside."""
    states = rows * row_bytes(config, context + block)
    if reads_prompts:
        states += PREFIX_CACHE_BYTES
    work = work_bytes(config, rows, block)
    if reads_prompts:
        work += rows * log_bytes(config, block)
    return GpuMemory(role, rows, weights, states, work, RUNTIME_BYTES, there)
