"""Both towers as differentiable functions of whole sequences.

The context tower reads a sequence once and returns K/V and the Mamba states before every block;
then all blocks of all rows run through the denoiser as one batch. Parameters are a plain dict under
the released names (experts stacked, see parameters.py), cast beforehand to the dtype to compute in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.towers.config.model_config import (
    ATTENTION,
    MAMBA,
    MOE,
    TIMESTEP_FEATURES,
    TwoTowerConfig,
)
from twotower.towers.training.operators import PLAIN, MambaWeights, Operators
from twotower.towers.training.parameters import CONTEXT, DENOISER, ROUTER_BIAS
from twotower.towers.training.scan import take_rows

# Decays and the router's bias stay fp32: a decay acts at every token, so its rounding adds up.
FP32_NAMES = ("A_log", "D", "dt_bias", ROUTER_BIAS)

Loads = dict[str, Tensor]


@dataclass
class ContextMemory:
    """States of the context tower that the denoiser reads, by layer index.

    `keys`, `values` [R, T, kv, hd]; `borders` [R, n+1, heads, N, P] are the SSM states before each
    of the n blocks and after the last, `tails` [R, n, K-1, Cd] the raw convolution inputs before
    each block.
    """

    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    borders: dict[int, Tensor] = field(default_factory=dict)
    tails: dict[int, Tensor] = field(default_factory=dict)

    def from_block(self, first: int) -> ContextMemory:
        """The same memory with the states of blocks `first`, `first` + 1, ... only."""
        return ContextMemory(
            self.keys,
            self.values,
            {layer: state[:, first:-1] for layer, state in self.borders.items()},
            {layer: tail[:, first:] for layer, tail in self.tails.items()},
        )


def cast_parameters(params: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Parameters in `dtype`, decays and router bias in fp32; gradients flow to the originals."""
    return {
        name: value if name.rpartition(".")[2] in FP32_NAMES else value.to(dtype)
        for name, value in params.items()
    }


def context_hidden(
    params: Mapping[str, Tensor],
    config: TwoTowerConfig,
    tokens: Tensor,
    block_size: int,
    operators: Operators = PLAIN,
    loads: Loads | None = None,
) -> tuple[Tensor, ContextMemory]:
    """Final normed hidden [R, T, H] of `tokens` [R, T], and the memory; T is a multiple of
    `block_size`. `loads` receives the number of tokens per expert of each MoE layer, fp32 [E]."""
    tower = TowerView(params, config, CONTEXT, operators, loads)
    memory = ContextMemory()
    hidden = F.embedding(tokens, params[f"{CONTEXT}.embeddings.weight"])
    for layer, kind in enumerate(config.layer_pattern):
        inner = tower.norm(f"layers.{layer}.norm", hidden)
        if kind == MAMBA:
            inner = _context_mamba(tower, layer, inner, block_size, memory)
        elif kind == ATTENTION:
            inner = _context_attention(tower, layer, inner, memory)
        else:
            inner = tower.per_token(layer, kind, inner)
        hidden = hidden + inner
    return tower.norm("norm_f", hidden), memory


def denoiser_hidden(
    params: Mapping[str, Tensor],
    config: TwoTowerConfig,
    blocks: Tensor,
    timesteps: Tensor,
    memory: ContextMemory,
    starts: Tensor,
    operators: Operators = PLAIN,
    loads: Loads | None = None,
) -> Tensor:
    """Final normed hidden [R, m, L, H] of the blocks [R, m, L] at their timesteps [R, m].

    Block j attends to the first `starts[j]` context tokens; the memory holds the states before the
    m blocks.
    """
    tower = TowerView(params, config, DENOISER, operators, loads)
    hidden = F.embedding(blocks, params[f"{DENOISER}.embeddings.weight"])
    condition = torch.unflatten(timestep_embedding(params, timesteps), -1, (3, -1))
    for layer, kind in enumerate(config.layer_pattern):
        rows = condition + params[f"scale_shift_tables.{layer}"]
        shift, scale, gate = (row.unsqueeze(2) for row in rows.unbind(2))
        name = f"layers.{layer}.norm"
        if kind in (MAMBA, ATTENTION):
            inner = tower.norm(name, hidden * (1 + scale) + shift)
        else:
            inner = tower.norm(name, hidden) * (1 + scale) + shift
        if kind == MAMBA:
            inner = _block_mamba(tower, layer, inner, memory)
        elif kind == ATTENTION:
            inner = _block_attention(tower, layer, inner, memory, starts)
        else:
            inner = tower.per_token(layer, kind, inner)
        hidden = hidden + gate * inner
    return tower.norm("norm_f", hidden)


def timestep_embedding(params: Mapping[str, Tensor], timesteps: Tensor) -> Tensor:
    """Shift, scale and gate of adaLN, joined [..., 3H], of timesteps [...] in [0, 1].

    Sinusoidal features in fp32, then an MLP. Source: Peebles and Xie 2023 (DiT), section 3.2.
    """
    half = TIMESTEP_FEATURES // 2
    frequency = torch.exp(torch.arange(half, device=timesteps.device) * (-math.log(10000.0) / half))
    angle = 1000.0 * timesteps.float()[..., None] * frequency
    features = torch.cat([angle.cos(), angle.sin()], dim=-1)
    inner = _linear(params, "t_embedder.mlp.0", features.to(params["t_block.1.weight"].dtype))
    inner = _linear(params, "t_embedder.mlp.2", F.silu(inner))
    return _linear(params, "t_block.1", F.silu(inner))


@dataclass(frozen=True)
class TowerView:
    """A tower's parameters, found by their names without the tower's prefix, and its operators."""

    params: Mapping[str, Tensor]
    config: TwoTowerConfig
    name: str
    operators: Operators
    loads: Loads | None

    def get(self, name: str) -> Tensor:
        """The parameter `name`; raises KeyError if the tower has none."""
        return self.params[f"{self.name}.{name}"]

    def find(self, name: str) -> Tensor | None:
        """The parameter `name`, or None if the tower has none."""
        return self.params.get(f"{self.name}.{name}")

    def linear(self, name: str, x: Tensor) -> Tensor:
        """x W^T + bias [.., N] of x [.., K], without a bias where there is none."""
        return _linear(self.params, f"{self.name}.{name}", x)

    def norm(self, name: str, x: Tensor) -> Tensor:
        """RMS norm of x [.., H] with the weight `name`."""
        weight = self.get(f"{name}.weight")
        return self.operators.rms_norm(x, weight, self.config.layer_norm_epsilon)

    def projections(self, mixer: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """in_proj split into gate z [.., Di], raw xBC [.., Cd] and raw dt [.., heads]."""
        config = self.config
        sizes = [config.d_inner, config.conv_dim, config.mamba_num_heads]
        z, raw, dt = torch.split(self.linear(f"{mixer}.in_proj", x), sizes, dim=-1)
        return z, raw, dt

    def heads(self, mixer: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [.., kv, group, hd], k and v [.., kv, hd]."""
        config = self.config
        kv, size = config.num_key_value_heads, config.head_dim
        q = torch.unflatten(self.linear(f"{mixer}.q_proj", x), -1, (kv, -1, size))
        k = torch.unflatten(self.linear(f"{mixer}.k_proj", x), -1, (kv, size))
        return q, k, torch.unflatten(self.linear(f"{mixer}.v_proj", x), -1, (kv, size))

    def per_token(self, layer: int, kind: str, x: Tensor) -> Tensor:
        """A MoE or dense MLP mixer on `x` [.., H]."""
        mixer = f"layers.{layer}.mixer"
        if kind != MOE:
            return self.mlp(mixer, x)
        flat = x.reshape(-1, x.shape[-1])
        routed = _routed_experts(self, mixer, flat)
        return (routed + self.mlp(f"{mixer}.shared_experts", flat)).view(x.shape)

    def mlp(self, name: str, x: Tensor) -> Tensor:
        """down(relu(up x)^2), [.., H] of x [.., H]."""
        return self.linear(f"{name}.down_proj", _relu2(self.linear(f"{name}.up_proj", x)))


def _relu2(x: Tensor) -> Tensor:
    positive = F.relu(x)
    return positive * positive


def _linear(params: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, params[f"{name}.weight"], params.get(f"{name}.bias"))


def _context_mamba(
    tower: TowerView, layer: int, x: Tensor, block_size: int, memory: ContextMemory
) -> Tensor:
    mixer = f"layers.{layer}.mixer"
    history = tower.config.conv_kernel - 1
    z, raw, dt = tower.projections(mixer, x)
    padded = F.pad(raw, (0, 0, history, 0))
    rows, length = x.shape[:2]
    chunks = length // block_size
    memory.tails[layer] = padded[:, :length].view(rows, chunks, block_size, -1)[:, :, :history]
    y, memory.borders[layer] = _mamba(tower, mixer, (z, padded, dt), (rows, chunks), None)
    return tower.linear(f"{mixer}.out_proj", y.reshape(rows, length, -1))


def _block_mamba(tower: TowerView, layer: int, x: Tensor, memory: ContextMemory) -> Tensor:
    mixer = f"layers.{layer}.mixer"
    z, raw, dt = tower.projections(mixer, x)
    padded = torch.cat([memory.tails[layer].to(raw.dtype), raw], dim=2).flatten(0, 1)
    borders = memory.borders[layer].to(raw.dtype)
    y, _ = _mamba(tower, mixer, (z, padded, dt), (x.shape[0], x.shape[1]), borders)
    return tower.linear(f"{mixer}.out_proj", y.reshape(*x.shape[:3], -1))


def _mamba(
    tower: TowerView,
    mixer: str,
    projected: tuple[Tensor, Tensor, Tensor],
    chunked: tuple[int, int],
    borders: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gated, normed output of the scan and its border states; `chunked` is (rows, chunks)."""
    config = tower.config
    weights = MambaWeights(
        tower.get(f"{mixer}.conv1d.weight")[:, 0],
        tower.find(f"{mixer}.conv1d.bias"),
        tower.get(f"{mixer}.dt_bias"),
        tower.get(f"{mixer}.A_log"),
        tower.get(f"{mixer}.D"),
        tower.get(f"{mixer}.norm.weight"),
    )
    sizes = (config.mamba_num_heads, config.n_groups, config.ssm_state_size)
    eps = config.layer_norm_epsilon
    return tower.operators.mamba_inner(*projected, weights, borders, chunked, sizes, eps)


def _context_attention(tower: TowerView, layer: int, x: Tensor, memory: ContextMemory) -> Tensor:
    mixer = f"layers.{layer}.mixer"
    q, k, v = tower.heads(mixer, x)
    memory.keys[layer], memory.values[layer] = k, v
    return tower.linear(f"{mixer}.o_proj", tower.operators.causal_attention(q, k, v))


def _block_attention(
    tower: TowerView, layer: int, x: Tensor, memory: ContextMemory, starts: Tensor
) -> Tensor:
    mixer = f"layers.{layer}.mixer"
    q, k, v = tower.heads(mixer, x)
    far_k, far_v = memory.keys[layer].to(k.dtype), memory.values[layer].to(v.dtype)
    out = tower.operators.block_attention(q, k, v, far_k, far_v, starts)
    return tower.linear(f"{mixer}.o_proj", out)


def _routed_experts(tower: TowerView, mixer: str, x: Tensor) -> Tensor:
    """Weighted sum [N, H] of each token's experts for `x` [N, H]: tokens are sorted by expert and
    every expert takes one product."""
    chosen, weights = _route(tower, mixer, x)
    experts = tower.config.n_routed_experts
    counts = torch.bincount(chosen.flatten(), minlength=experts)
    if tower.loads is not None:
        tower.loads[f"{tower.name}.{mixer}.gate.{ROUTER_BIAS}"] = counts.float()
    order = chosen.flatten().argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    per_token = chosen.shape[1]
    parts = torch.split(take_rows(x, order // per_token, inverse), counts.tolist())
    up = tower.get(f"{mixer}.experts.up_proj.weight").unbind(0)
    down = tower.get(f"{mixer}.experts.down_proj.weight").unbind(0)
    outputs = [F.linear(_relu2(F.linear(part, up[e])), down[e]) for e, part in enumerate(parts)]
    restored = take_rows(torch.cat(outputs), inverse, order)
    weighted = restored.view(-1, per_token, x.shape[1]) * weights.to(x.dtype)[..., None]
    return weighted.sum(1)


def _route(tower: TowerView, mixer: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Chosen experts [N, k] and their fp32 weights [N, k]."""
    config = tower.config
    scores = F.linear(x.float(), tower.get(f"{mixer}.gate.weight").float()).sigmoid()
    choice = scores.detach() + tower.get(f"{mixer}.gate.{ROUTER_BIAS}")
    if config.n_group > 1:
        grouped = torch.unflatten(choice, -1, (config.n_group, -1))
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(config.topk_group, dim=-1).indices
        kept = torch.zeros_like(grouped[..., 0]).scatter(-1, best, 1.0)
        choice = (grouped * kept[..., None]).flatten(-2)
    chosen = choice.topk(config.num_experts_per_tok, dim=-1).indices
    weights = scores.gather(-1, chosen)
    if config.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return chosen, weights * config.routed_scaling_factor
