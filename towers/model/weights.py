"""Weights of both towers, on their device and in their dtype; [out, in] for projections."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from twotower.kernels.moe import ExpertWeights


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


@dataclass(frozen=True)
class TowerWeights:
    """Embedding and head [V, H], final norm [H] and the layers of one tower."""

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor
    head: Tensor


@dataclass(frozen=True)
class TimestepWeights:
    """Timestep MLP ([H, 256], [H, H]), its projection [3 H, H], and a table [layers, 3, H] whose
    rows are shift, scale and gate."""

    first: Tensor
    first_bias: Tensor
    second: Tensor
    second_bias: Tensor
    projection: Tensor
    projection_bias: Tensor
    table: Tensor
