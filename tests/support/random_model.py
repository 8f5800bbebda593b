"""Random checkpoints in the released layout, small enough to write for a single test."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from twotower.towers.checkpoint.checkpoint import tensor_shapes
from twotower.towers.config.model_config import TwoTowerConfig

SMALL = TwoTowerConfig(
    vocab_size=24,
    hidden_size=16,
    layer_pattern="M*E-",
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    mamba_num_heads=4,
    mamba_head_dim=4,
    n_groups=2,
    ssm_state_size=4,
    conv_kernel=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    moe_shared_expert_intermediate_size=8,
    intermediate_size=8,
    n_group=2,
    topk_group=1,
    norm_topk_prob=True,
    routed_scaling_factor=1.0,
    layer_norm_epsilon=1e-5,
    max_position_embeddings=4096,
)


def small_config(**changes: Any) -> TwoTowerConfig:
    """A config with every kind of layer and 24 tokens, with changes."""
    return replace(SMALL, **changes)


def random_tensors(config: TwoTowerConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random weights of moderate size for every tensor of a checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        value = torch.randn(shape, generator=generator)
        if len(shape) > 1 and "embeddings" not in name:
            value = value / shape[-1] ** 0.5
        elif "norm" in name:
            value = 1.0 + 0.1 * value
        elif len(shape) == 1:
            value = 0.1 * value
        tensors[name] = value
    return tensors


def write_checkpoint(
    folder: Path,
    config: TwoTowerConfig = SMALL,
    tensors: dict[str, Tensor] | None = None,
    changes: dict[str, Any] | None = None,
) -> Path:
    """Writes config.json (with `changes` to its keys) and model.safetensors; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    body = config.to_dict() | (changes or {})
    (folder / "config.json").write_text(json.dumps(body), encoding="utf-8")
    if tensors is None:
        tensors = random_tensors(config)
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_shards(folder: Path, config: TwoTowerConfig = SMALL) -> dict[str, str]:
    """Writes the same as two shards with an index; returns the weight map."""
    write_checkpoint(folder, config)
    (folder / "model.safetensors").unlink()
    tensors = random_tensors(config)
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file_name = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file_name)
        weight_map |= dict.fromkeys(part, file_name)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    """Writes (or replaces) the index."""
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
