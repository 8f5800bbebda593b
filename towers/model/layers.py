"""The four mixers of the hybrid backbone, shared by both towers.

Each takes packed tokens [T, H] and gives [T, H]. None writes a state: what a pass adds to a row's
context (raw Mamba projections, K/V) is returned to the caller.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from twotower.kernels import dispatch
from twotower.kernels.attention import PagedKeyValues
from twotower.kernels.mamba_scan import MambaScanWeights
from twotower.kernels.moe import ExpertWeights, RouterRule
from twotower.kernels.rows import Rows
from twotower.towers.config.model_config import TwoTowerConfig


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

    def for_scan(self, config: TwoTowerConfig) -> MambaScanWeights:
        """What stands between the projections."""
        return MambaScanWeights(
            self.conv_weight, self.conv_bias, self.a_log, self.d, self.dt_bias, config.n_groups
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
    shared MLP. On a GPU the experts are one stacked tensor, elsewhere a packed weight each, and
    `narrow_gate` [P, E, H] are the gate's bf16 parts (`moe.narrow_parts`)."""

    gate: Tensor
    choice_bias: Tensor
    up: ExpertWeights
    down: ExpertWeights
    shared: MlpWeights
    narrow_gate: Tensor | None = None


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
    rows: Rows,
    conv_state: Tensor,
    ssm_state: Tensor,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """conv_state [S, K-1, Cd] and ssm_state [S, H, P, N] of one layer. Returns the output, and
    views of the raw xBC [T, Cd] and dt [T, H], of `into` [T, Di + Cd + H] if that is given."""
    projected = dispatch.linear(x, weights.in_proj, weights.in_proj_bias, into)
    y = dispatch.mamba_scan(projected, weights.for_scan(config), conv_state, ssm_state, rows)
    z, xbc, dt = projected.split((config.d_inner, config.conv_dim, config.mamba_num_heads), dim=-1)
    u = dispatch.gated_group_norm(y, z, weights.norm, config.n_groups, config.layer_norm_epsilon)
    return dispatch.linear(u, weights.out_proj, weights.out_proj_bias), xbc, dt


def attention(
    x: Tensor,
    weights: AttentionWeights,
    config: TwoTowerConfig,
    rows: Rows,
    context: PagedKeyValues,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the output, and views of the new K and V [T, nkv, hd]."""
    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    qkv = dispatch.linear(x, weights.qkv, weights.qkv_bias).unflatten(-1, (-1, width))
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
    out = dispatch.attention(q, k, v, context, rows, causal)
    return dispatch.linear(out, weights.o_proj, weights.o_proj_bias), k, v


def moe(x: Tensor, weights: MoeWeights, config: TwoTowerConfig, rows: Rows) -> Tensor:
    """Routed experts plus the shared MLP."""
    rule = RouterRule(
        config.num_experts_per_tok,
        config.n_group,
        config.topk_group,
        config.norm_topk_prob,
        config.routed_scaling_factor,
    )
    ids, scores = dispatch.route(
        x, weights.gate, weights.choice_bias, rule, rows.real, weights.narrow_gate
    )
    shared = weights.shared
    return dispatch.experts(x, ids, scores, weights.up, weights.down, shared.up, shared.down)


def mlp(x: Tensor, weights: MlpWeights) -> Tensor:
    """down(relu(up x)^2)."""
    return dispatch.mlp(x, weights.up, weights.down, weights.up_bias, weights.down_bias)
