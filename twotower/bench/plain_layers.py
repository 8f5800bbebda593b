"""The layers of both towers in plain PyTorch, as a good port without custom kernels would run them.

Rows have equal lengths and contexts, so they form a batch without padding: x [B, L, H]. All experts
of a layer are one grouped product, grouped heads go through scaled dot product attention, the scan
of a block is one chunk of matrix products. There is no host sync, so each function compiles whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.towers.config.model_config import TwoTowerConfig
from twotower.towers.model.weights import AttentionWeights, MambaWeights, MlpWeights, MoeWeights


@dataclass(frozen=True)
class Modulation:
    """Shift, scale and gate [B, 1, H] of a denoiser's layer; `first` if shift and scale come before
    the norm."""

    shift: Tensor
    scale: Tensor
    gate: Tensor
    first: bool


@dataclass(frozen=True)
class Layer:
    """A layer's norm weight [H] and modulation, which a context tower does not have."""

    config: TwoTowerConfig
    norm: Tensor
    modulation: Modulation | None

    def normed(self, hidden: Tensor) -> Tensor:
        """The mixer's input: `hidden` normed and modulated."""
        by, eps = self.modulation, self.config.layer_norm_epsilon
        if by is None:
            return rms_norm(hidden, self.norm, eps)
        if by.first:
            return rms_norm(hidden * (1.0 + by.scale) + by.shift, self.norm, eps)
        return rms_norm(hidden, self.norm, eps) * (1.0 + by.scale) + by.shift

    def add(self, hidden: Tensor, mixed: Tensor) -> Tensor:
        """The residual stream after the mixer."""
        return hidden + mixed if self.modulation is None else hidden + self.modulation.gate * mixed


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last dimension, computed in fp32."""
    wide = x.float()
    unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (unit * weight.float()).to(x.dtype)


def mamba_layer(
    hidden: Tensor, layer: Layer, weights: MambaWeights, conv: Tensor, ssm: Tensor, moves: bool
) -> Tensor:
    """A Mamba-2 layer. conv [B, K-1, Cd] and ssm [B, H, P, N] are advanced in place if `moves`."""
    config = layer.config
    inner, heads = config.d_inner, config.mamba_num_heads
    shared = config.n_groups * config.ssm_state_size
    projected = F.linear(layer.normed(hidden), weights.in_proj, weights.in_proj_bias)
    z, xbc, dt = projected.split((inner, config.conv_dim, heads), dim=-1)
    padded = torch.cat((conv, xbc), dim=1)
    taps = weights.conv_weight.contiguous().unsqueeze(1)
    mixed = F.conv1d(padded.mT, taps, weights.conv_bias, groups=config.conv_dim).mT
    values, keys, queries = F.silu(mixed).float().split((inner, shared, shared), dim=-1)
    y = _scan(
        values.unflatten(-1, (heads, -1)),
        F.softplus(dt.float() + weights.dt_bias),
        weights,
        keys.unflatten(-1, (config.n_groups, -1)),
        queries.unflatten(-1, (config.n_groups, -1)),
        ssm,
        moves,
    )
    if moves:
        conv.copy_(padded[:, -conv.shape[1] :])
    gated = (y.flatten(-2) * F.silu(z.float())).unflatten(-1, (config.n_groups, -1))
    unit = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + config.layer_norm_epsilon)
    u = (unit.flatten(-2) * weights.norm.float()).to(z.dtype)
    return layer.add(hidden, F.linear(u, weights.out_proj, weights.out_proj_bias))


def attention_layer(
    hidden: Tensor, layer: Layer, weights: AttentionWeights, k: Tensor, v: Tensor, causal: bool
) -> Tensor:
    """An attention layer. k and v [B, nkv, S + L, hd]: their last L positions are overwritten with
    K/V of the L tokens of `hidden`."""
    config, length = layer.config, hidden.shape[1]
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    qkv = F.linear(layer.normed(hidden), weights.qkv, weights.qkv_bias)
    qkv = qkv.unflatten(-1, (-1, config.head_dim)).transpose(1, 2)
    q, k_new, v_new = qkv.split((heads, kv_heads, kv_heads), dim=1)
    k[:, :, -length:] = k_new
    v[:, :, -length:] = v_new
    mask = None
    if causal and length > 1:
        mask = torch.ones(length, k.shape[2], dtype=torch.bool, device=k.device)
        mask = mask.tril(k.shape[2] - length)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    out = out.transpose(1, 2).flatten(-2)
    return layer.add(hidden, F.linear(out, weights.o_proj, weights.o_proj_bias))


def moe_layer(
    hidden: Tensor, layer: Layer, weights: MoeWeights, up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor]:
    """A mixture of experts with up [E, F, H] and down [E, H, F]; also returns the experts chosen,
    [B * L, k]."""
    config = layer.config
    normed = layer.normed(hidden)
    x = normed.flatten(0, 1)
    scores = torch.sigmoid(F.linear(x.double(), weights.gate))
    ids = (scores + weights.choice_bias.double()).topk(config.num_experts_per_tok, dim=-1).indices
    shares = scores.gather(1, ids)
    if config.norm_topk_prob:
        shares = shares / (shares.sum(-1, keepdim=True) + 1e-20)
    shares = (shares * config.routed_scaling_factor).float()
    order = ids.flatten().argsort(stable=True)
    experts = torch.arange(config.n_routed_experts, device=x.device)
    ends = (ids.flatten().unsqueeze(0) <= experts.unsqueeze(1)).sum(1, dtype=torch.int32)
    gathered = x[order // ids.shape[1]]
    inner = F.relu(F.grouped_mm(gathered, up.mT, offs=ends)).square()
    by_slot = torch.empty_like(gathered)
    by_slot[order] = F.grouped_mm(inner, down.mT, offs=ends)
    routed = (by_slot.view(*ids.shape, -1).float() * shares.unsqueeze(-1)).sum(1).to(x.dtype)
    mixed = routed.view_as(normed) + _mlp(normed, weights.shared)
    return layer.add(hidden, mixed), ids


def mlp_layer(hidden: Tensor, layer: Layer, weights: MlpWeights) -> Tensor:
    """A dense MLP layer."""
    return layer.add(hidden, _mlp(layer.normed(hidden), weights))


def _mlp(x: Tensor, weights: MlpWeights) -> Tensor:
    inner = F.relu(F.linear(x, weights.up, weights.up_bias)).square()
    return F.linear(inner, weights.down, weights.down_bias)


def _scan(
    x: Tensor,
    dt: Tensor,
    weights: MambaWeights,
    b: Tensor,
    c: Tensor,
    state: Tensor,
    moves: bool,
) -> Tensor:
    """x [B, L, H, P], dt [B, L, H], b and c [B, L, G, N], state [B, H, P, N] -> [B, L, H, P]."""
    per_group, length = x.shape[2] // b.shape[2], x.shape[1]
    sums = torch.cumsum(dt * -torch.exp(weights.a_log), dim=1).transpose(1, 2)
    keys = b.repeat_interleave(per_group, dim=2).transpose(1, 2)
    queries = c.repeat_interleave(per_group, dim=2).transpose(1, 2)
    values = (dt.unsqueeze(-1) * x).transpose(1, 2)
    future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
    decay = torch.exp((sums.unsqueeze(-1) - sums.unsqueeze(-2)).masked_fill(future, float("-inf")))
    y = (queries @ keys.mT * decay) @ values
    y = y + (queries @ state.mT) * torch.exp(sums).unsqueeze(-1)
    if moves:
        to_end = torch.exp(sums[..., -1:] - sums).unsqueeze(-1)
        kept = state * torch.exp(sums[..., -1]).view(*sums.shape[:2], 1, 1)
        state.copy_(kept + (values * to_end).mT @ keys)
    return y.transpose(1, 2) + weights.d.view(1, 1, -1, 1) * x
