"""Configs of two-tower checkpoints, and those of models that are not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, NemotronHConfig, NemotronHForCausalLM

from twotower.towers.config.model_config import TwoTowerConfig
from twotower.transformers import SHIPPED_MODEL, NemotronHTwoTowerConfig

SMALL: dict[str, Any] = {
    "hybrid_override_pattern": "ME*",
    "hidden_size": 16,
    "vocab_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "mamba_num_heads": 2,
    "mamba_head_dim": 8,
    "n_groups": 1,
    "ssm_state_size": 4,
    "n_routed_experts": 2,
    "moe_intermediate_size": 8,
    "moe_shared_expert_intermediate_size": 8,
    "intermediate_size": 8,
}


@pytest.mark.parametrize("name", ["tiny_a", "tiny_b", "shipped"])
def test_every_key_of_the_file_is_kept(name: str, tmp_path: Path) -> None:
    folder = SHIPPED_MODEL if name == "shipped" else Path(__file__).parents[1] / "golden" / name
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is NemotronHTwoTowerConfig
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for key in raw.keys() - {"torch_dtype", "transformers_version"}:
        assert getattr(config, key) == raw[key], key
        assert config.to_dict()[key] == raw[key], key
    if "torch_dtype" in raw:
        assert config.dtype == getattr(torch, raw["torch_dtype"])
    config.save_pretrained(tmp_path)
    saved = TwoTowerConfig.from_file(tmp_path / "config.json")
    assert saved == TwoTowerConfig.from_file(folder / "config.json")


def test_infinity_comes_through(tiny_a: Path) -> None:
    assert AutoConfig.from_pretrained(tiny_a).time_step_limit == [0.0, math.inf]


def test_models_of_one_tower_stay_with_transformers(tmp_path: Path) -> None:
    """They have the same `model_type`."""
    NemotronHForCausalLM(NemotronHConfig(**SMALL)).save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is NemotronHConfig
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is NemotronHForCausalLM
