"""Names, shapes and initial values of both towers' parameters.

Training keeps the released names, but holds the experts of a layer as one tensor
(`mixer.experts.up_proj.weight` [E, F, H]); `stack_experts` and `split_experts` convert between the
two.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from twotower.towers.config.model_config import (
    ATTENTION,
    MAMBA,
    MOE,
    TIMESTEP_FEATURES,
    TwoTowerConfig,
)

Parameters = dict[str, Tensor]

CONTEXT, DENOISER = "context_tower", "denoiser_tower"
CONTEXT_HEAD, DENOISER_HEAD = "context_lm_head.weight", "lm_head.weight"
ROUTER_BIAS = "e_score_correction_bias"
_EXPERT = re.compile(r"(.*\.mixer\.experts)\.(\d+)\.(up_proj|down_proj)\.(weight|bias)")
# Bounds of the initial dt: dt_bias is its inverse softplus. Source: Gu and Dao 2023 (Mamba),
# section 3.6.
_DT_MIN, _DT_MAX = 1e-3, 1e-1


def stack_experts(released: Mapping[str, Tensor]) -> Parameters:
    """Released tensors, with each layer's experts stacked along a new first axis."""
    params: Parameters = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for name, value in released.items():
        match = _EXPERT.fullmatch(name)
        if match is None:
            params[name] = value
        else:
            owner, index, matrix, kind = match.groups()
            experts.setdefault(f"{owner}.{matrix}.{kind}", {})[int(index)] = value
    for name, parts in experts.items():
        params[name] = torch.stack([parts[i] for i in range(len(parts))])
    return params


def split_experts(params: Mapping[str, Tensor]) -> Parameters:
    """Released tensors of stacked parameters: the inverse of `stack_experts`."""
    released: Parameters = {}
    for name, value in params.items():
        owner, found, matrix = name.partition(".mixer.experts.")
        if not found:
            released[name] = value
            continue
        for index, part in enumerate(value.unbind(0)):
            released[f"{owner}.mixer.experts.{index}.{matrix}"] = part
    return released


def initial_context(config: TwoTowerConfig, generator: torch.Generator) -> Parameters:
    """Fresh fp32 parameters of the context tower and its head, experts stacked."""
    hidden, vocab = config.hidden_size, config.vocab_size
    params = {
        f"{CONTEXT}.embeddings.weight": _normal((vocab, hidden), 0.1, generator),
        f"{CONTEXT}.norm_f.weight": torch.ones(hidden),
        CONTEXT_HEAD: torch.zeros(vocab, hidden),
    }
    for index, kind in enumerate(config.layer_pattern):
        layer = f"{CONTEXT}.layers.{index}"
        params[f"{layer}.norm.weight"] = torch.ones(hidden)
        for name, value in _mixer(config, kind, generator).items():
            params[f"{layer}.mixer.{name}"] = value
    return params


def initial_denoiser(
    config: TwoTowerConfig, context: Mapping[str, Tensor], generator: torch.Generator
) -> Parameters:
    """Fresh parameters of the denoiser: a copy of the context tower, with timestep conditioning
    that is the identity at every t."""
    params = {
        name.replace(CONTEXT, DENOISER, 1): value.clone()
        for name, value in context.items()
        if name.startswith(f"{CONTEXT}.")
    }
    hidden = config.hidden_size
    params[DENOISER_HEAD] = context[CONTEXT_HEAD].clone()
    params["t_embedder.mlp.0.weight"] = _fan_in((hidden, TIMESTEP_FEATURES), generator)
    params["t_embedder.mlp.0.bias"] = torch.zeros(hidden)
    params["t_embedder.mlp.2.weight"] = _fan_in((hidden, hidden), generator)
    params["t_embedder.mlp.2.bias"] = torch.zeros(hidden)
    params["t_block.1.weight"] = torch.zeros(3 * hidden, hidden)
    params["t_block.1.bias"] = torch.zeros(3 * hidden)
    for index in range(config.num_layers):
        table = torch.zeros(3, hidden)
        table[2] = 1.0
        params[f"scale_shift_tables.{index}"] = table
    return params


def _mixer(config: TwoTowerConfig, kind: str, generator: torch.Generator) -> Parameters:
    if kind == MAMBA:
        return _mamba(config, generator)
    if kind == ATTENTION:
        return _attention(config, generator)
    if kind == MOE:
        return _moe(config, generator)
    return _mlp("", config.intermediate_size, config.hidden_size, generator)


def _mamba(config: TwoTowerConfig, generator: torch.Generator) -> Parameters:
    heads, inner, channels = config.mamba_num_heads, config.d_inner, config.conv_dim
    spread = torch.rand(heads, generator=generator)
    dt = torch.exp(math.log(_DT_MIN) + spread * (math.log(_DT_MAX) - math.log(_DT_MIN)))
    params = {
        "in_proj.weight": _fan_in((inner + channels + heads, config.hidden_size), generator),
        "conv1d.weight": _normal((channels, 1, config.conv_kernel), 0.3, generator),
        "A_log": torch.log(1.0 + 15.0 * torch.rand(heads, generator=generator)),
        "D": torch.ones(heads),
        "dt_bias": dt + torch.log(-torch.expm1(-dt)),
        "norm.weight": torch.ones(inner),
        "out_proj.weight": torch.zeros(config.hidden_size, inner),
    }
    if config.use_conv_bias:
        params["conv1d.bias"] = torch.zeros(channels)
    return params


def _attention(config: TwoTowerConfig, generator: torch.Generator) -> Parameters:
    hidden = config.hidden_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    return {
        "q_proj.weight": _fan_in((queries, hidden), generator),
        "k_proj.weight": _fan_in((keys, hidden), generator),
        "v_proj.weight": _fan_in((keys, hidden), generator),
        "o_proj.weight": torch.zeros(hidden, queries),
    }


def _moe(config: TwoTowerConfig, generator: torch.Generator) -> Parameters:
    experts, hidden, width = (
        config.n_routed_experts,
        config.hidden_size,
        config.moe_intermediate_size,
    )
    shared = config.moe_shared_expert_intermediate_size
    return {
        "gate.weight": _fan_in((experts, hidden), generator),
        f"gate.{ROUTER_BIAS}": torch.zeros(experts),
        "experts.up_proj.weight": _fan_in((experts, width, hidden), generator),
        "experts.down_proj.weight": torch.zeros(experts, hidden, width),
        **_mlp("shared_experts.", shared, hidden, generator),
    }


def _mlp(prefix: str, width: int, hidden: int, generator: torch.Generator) -> Parameters:
    return {
        f"{prefix}up_proj.weight": _fan_in((width, hidden), generator),
        f"{prefix}down_proj.weight": torch.zeros(hidden, width),
    }


def _fan_in(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return _normal(shape, shape[-1] ** -0.5, generator)


def _normal(shape: tuple[int, ...], deviation: float, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator) * deviation
