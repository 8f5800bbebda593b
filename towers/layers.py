"""The four mixers of the hybrid backbone, shared by both towers.

Each takes packed tokens [T, H] and gives [T, H]. None writes a state: what a pass adds to a row's
context (raw Mamba projections, K/V) is returned to the caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.kernels import dispatch
from twotower.kernels.attention import KeyValuePages
from twotower.kernels.elementwise import softplus
from twotower.kernels.moe import ExpertWeights, RouterRule
from twotower.kernels.replay import ReplayWeights
from twotower.towers.config import TwoTowerConfig
from twotower.towers.packing import Packing
from twotower.towers.state import LayerLog


@dataclass(frozen=True)
class MambaWeights:
    """One Mamba-2 mixer; conv_weight [Cd, K], vectors [H] and [Di], projections [out, in]."""

    in_proj: Tensor
    in_proj_bias: Tensor | None
    conv_weight: Tensor
    conv_bias: Tensor | None
    a_log: Tensor
    d: Tensor
    dt_bias: Tensor
    norm: Tensor
    out_proj: Tensor
    out_proj_bias: Tensor | None

    def for_replay(self, config: TwoTowerConfig) -> ReplayWeights:
        """What advancing this layer's state needs."""
        return ReplayWeights(
            self.conv_weight, self.conv_bias, self.a_log, self.dt_bias, config.n_groups
        )


@dataclass(frozen=True)
class AttentionWeights:
    """One attention mixer; q, k and v stacked in one [(nq + 2 nkv) hd, H] product."""

    qkv: Tensor
    qkv_bias: Tensor | None
    o_proj: Tensor
    o_proj_bias: Tensor | None


@dataclass(frozen=True)
class MlpWeights:
    """A dense relu^2 MLP: up [F, H], down [H, F]."""

    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


@dataclass(frozen=True)
class MoeWeights:
    """Router gate [E, H] fp64 and bias [E] fp32, experts up E x [F, H] and down E x [H, F],
    shared MLP. On a GPU the experts are one stacked tensor, elsewhere a packed weight each."""

    gate: Tensor
    choice_bias: Tensor
    up: ExpertWeights
    down: ExpertWeights
    shared: MlpWeights


Mixer = MambaWeights | AttentionWeights | MlpWeights | MoeWeights


@dataclass(frozen=True)
class LayerWeights:
    """One residual layer: a pre-norm [H] and a mixer of the kind that the pattern names."""

    kind: str
    norm: Tensor
    mixer: Mixer


def mamba(
    x: Tensor,
    weights: MambaWeights,
    config: TwoTowerConfig,
    packing: Packing,
    histories: Sequence[Tensor],
    states: Sequence[Tensor],
) -> tuple[Tensor, LayerLog]:
    """Per row: history [K-1, Cd], state [H, P, N]. Returns output and the log of all T tokens."""
    inner, heads = config.d_inner, config.mamba_num_heads
    shared = config.n_groups * config.ssm_state_size
    projected = dispatch.linear(x, weights.in_proj, weights.in_proj_bias)
    z, xbc, dt = projected.split((inner, config.conv_dim, heads), dim=-1)
    steps = softplus(dt.float() + weights.dt_bias)
    outputs = []
    for run in packing.runs:
        history = _stack(histories, run.rows)
        conv = dispatch.causal_conv1d(
            run.take(xbc), weights.conv_weight, weights.conv_bias, history
        ).float()
        values, keys, queries = conv.split((inner, shared, shared), dim=-1)
        y = dispatch.chunk_scan(
            values.unflatten(-1, (heads, -1)),
            run.take(steps),
            weights.a_log,
            keys.unflatten(-1, (config.n_groups, -1)),
            queries.unflatten(-1, (config.n_groups, -1)),
            weights.d,
            _stack(states, run.rows),
        )
        outputs.append(y.reshape(-1, inner))
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    u = dispatch.gated_group_norm(y, z, weights.norm, config.n_groups, config.layer_norm_epsilon)
    return dispatch.linear(u, weights.out_proj, weights.out_proj_bias), LayerLog(xbc, dt)


def attention(
    x: Tensor,
    weights: AttentionWeights,
    config: TwoTowerConfig,
    packing: Packing,
    contexts: Sequence[KeyValuePages],
    causal: bool,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Per row: its context's K/V. Returns output and each row's new K/V [nkv, L, hd]."""
    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    qkv = dispatch.linear(x, weights.qkv, weights.qkv_bias).unflatten(-1, (-1, width))
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
    outputs, added = [], []
    for row, context in enumerate(contexts):
        span = packing.slice_of(row)
        k_new = k[span].transpose(0, 1).contiguous()
        v_new = v[span].transpose(0, 1).contiguous()
        outputs.append(dispatch.attention(q[span].contiguous(), context, k_new, v_new, causal))
        added.append((k_new, v_new))
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return dispatch.linear(out, weights.o_proj, weights.o_proj_bias), added


def moe(x: Tensor, weights: MoeWeights, config: TwoTowerConfig) -> Tensor:
    """Routed experts plus the shared MLP."""
    rule = RouterRule(
        config.num_experts_per_tok,
        config.n_group,
        config.topk_group,
        config.norm_topk_prob,
        config.routed_scaling_factor,
    )
    ids, scores = dispatch.route(x, weights.gate, weights.choice_bias, rule)
    return dispatch.experts(x, ids, scores, weights.up, weights.down) + mlp(x, weights.shared)


def mlp(x: Tensor, weights: MlpWeights) -> Tensor:
    """down(relu(up x)^2)."""
    return dispatch.mlp(x, weights.up, weights.down, weights.up_bias, weights.down_bias)


def _stack(parts: Sequence[Tensor], rows: range) -> Tensor:
    """The rows' tensors as one batch; a view for a single row."""
    if len(rows) == 1:
        return parts[rows.start].unsqueeze(0)
    return torch.stack([parts[row] for row in rows])
