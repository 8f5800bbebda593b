"""Bytes that each GPU of a placement needs, by the rules by which the service allocates them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

# CUDA context, kernels, graphs and NCCL's buffers; assumed, not measured.
RUNTIME_BYTES = 2 << 30
# As in the service: states take at most this share of what weights and passes leave.
STATE_SHARE = 0.95
PREFIX_CACHE_BYTES = 256 << 20
_VALUE, _SCALE = 2, 4
Side = Literal["context", "denoiser"]


@dataclass(frozen=True)
class GpuMemory:
    """Bytes on one GPU: weights; states, K/V and logs of its rows; tensors of a pass; the CUDA
    runtime. `there` is the GPU's whole memory."""

    role: str
    rows: int
    weights: int
    states: int
    work: int
    runtime: int
    there: int

    @property
    def needed(self) -> int:
        """All parts together, and the bytes that must stay free beside the states."""
        spare = self.work + round(self.states * (1 / STATE_SHARE - 1))
        return self.weights + self.states + spare + self.runtime

    @property
    def fits(self) -> bool:
        return self.needed <= self.there

    def arithmetic(self) -> str:
        """The sum of the parts as a sentence."""
        spare = self.needed - self.weights - self.states - self.runtime
        return (
            f"{self.role} GPU: needs {self.needed} bytes ({self.weights} weights + {self.states} "
            f"states of {self.rows} rows + {spare} for passes + {self.runtime} runtime), "
            f"has {self.there}"
        )


@lru_cache
def tower_bytes(config: TwoTowerConfig, *, fp8: bool) -> Mapping[Side, int]:
    """Bytes of each tower's weights, head and time conditioning included: in bf16, with routed
    experts in 8 bits and fp32 scales if `fp8`."""
    config = replace(config, quantized_experts=fp8)
    narrow = set(expert_matrices(config)) if fp8 else set()
    scales = {scale_name(name) for name in narrow}
    sums: dict[Side, int] = {"context": 0, "denoiser": 0}
    for name, shape in tensor_shapes(config).items():
        size = 1 if name in narrow else _SCALE if name in scales else _VALUE
        context = name.startswith(("context_tower.", "context_lm_head."))
        sums["context" if context else "denoiser"] += prod(shape) * size
    return sums


def row_bytes(config: TwoTowerConfig, tokens: int) -> int:
    """Bytes of a row's slot and of its pages for so many tokens."""
    pages = pages_for(tokens) * page_bytes(config, torch.bfloat16)
    return slot_bytes(config, torch.bfloat16) + pages


def work_bytes(config: TwoTowerConfig, rows: int, block: int, side: Side) -> int:
    """Bytes that the service reserves for a tower's passes at its default limits."""
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
    """Memory of a GPU with `rows` rows of `context` tokens and the towers `sides`; with a context
    tower it also holds the prefix cache."""
    states = rows * row_bytes(config, context + block)
    if "context" in sides:
        states += PREFIX_CACHE_BYTES
    work = sum(work_bytes(config, rows, block, side) for side in sides)
    return GpuMemory(role, rows, weights, states, work, RUNTIME_BYTES, there)
