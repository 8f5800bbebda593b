"""Writes checkpoints of random weights with any config."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch

from tests.support.random_model import write_checkpoint
from twotower.planner.shapes import LARGE
from twotower.towers.checkpoint.checkpoint import tensor_shapes
from twotower.towers.config.model_config import TwoTowerConfig

MEDIUM = replace(
    LARGE,
    vocab_size=4096,
    hidden_size=512,
    layer_pattern="MEM*EMEM*EME",
    num_attention_heads=8,
    head_dim=64,
    mamba_num_heads=16,
    n_groups=4,
    ssm_state_size=64,
    n_routed_experts=32,
    num_experts_per_tok=4,
    moe_intermediate_size=384,
    moe_shared_expert_intermediate_size=768,
    intermediate_size=384,
    max_position_embeddings=65536,
)


def write_random_checkpoint(folder: Path, config: TwoTowerConfig) -> None:
    """Writes config.json and model.safetensors (fp32) into `folder`."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: _random(name, shape, generator) for name, shape in tensor_shapes(config).items()
    }
    write_checkpoint(folder, config, tensors)


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if name.endswith("A_log"):
        return torch.log(1.0 + 15.0 * torch.rand(shape, generator=generator))
    if name.endswith("dt_bias"):
        return torch.randn(shape, generator=generator) - 3.0
    if name.endswith(("norm.weight", "norm_f.weight", ".D")):
        return torch.ones(shape)
    if name.startswith("scale_shift_tables"):
        return torch.stack((torch.zeros(shape[1]), torch.zeros(shape[1]), torch.ones(shape[1])))
    fan_in = shape[-1] if len(shape) > 1 else 1
    scale = 0.02 if len(shape) == 1 else 1.0 / math.sqrt(fan_in)
    return torch.randn(shape, generator=generator) * scale
