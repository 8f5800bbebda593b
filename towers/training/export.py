"""Writes and reads a trained model as a checkpoint folder in the released layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from twotower.towers.config.model_config import TwoTowerConfig
from twotower.towers.errors import CheckpointError
from twotower.towers.training.parameters import ROUTER_BIAS, split_experts, stack_experts
from twotower.towers.training.tokenizer import plain_text_only, tokenizer_config

MAX_BYTES = 20_000_000
_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def export_model(
    folder: Path, config: TwoTowerConfig, params: Mapping[str, Tensor], tokenizer: Tokenizer
) -> int:
    """Writes config, bf16 weights (router bias fp32) and tokenizer, with what transformers wants to
    know of it; returns their size in bytes.

    Raises ValueError if it is above `MAX_BYTES`, since the folder ships in the package.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: value.detach().to(torch.float32 if name.endswith(ROUTER_BIAS) else torch.bfloat16)
        for name, value in split_experts(params).items()
    }
    contiguous = {name: value.contiguous() for name, value in sorted(tensors.items())}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", config.to_dict())
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    described = tokenizer_config(config.max_position_embeddings)
    _write_json(folder / "tokenizer_config.json", described)
    total = sum((folder / name).stat().st_size for name in _FILES)
    if total > MAX_BYTES:
        raise ValueError(f"{folder}: got {total} bytes, expected at most {MAX_BYTES}")
    return total


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_for_training(folder: Path) -> tuple[TwoTowerConfig, dict[str, Tensor], Tokenizer]:
    """Config, fp32 parameters with stacked experts, and tokenizer of an exported folder.

    Raises CheckpointError for a quantized checkpoint.
    """
    config = TwoTowerConfig.from_file(folder / "config.json")
    if config.quantized_experts:
        raise CheckpointError(f"{folder.name}: its experts are quantized, training needs all bits")
    released = load_file(folder / "model.safetensors")
    params = stack_experts({name: value.float() for name, value in released.items()})
    tokenizer = plain_text_only(Tokenizer.from_file(str(folder / "tokenizer.json")))
    return config, params, tokenizer
