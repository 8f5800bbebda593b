"""The hybrid Mamba / attention / MoE stack that both towers share, and its four mixers.

A mixer takes packed tokens [T, H] and gives [T, H]. None writes a state: what a pass adds to a
row's context (raw Mamba projections, K/V) is returned to the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from twotower.kernels import dispatch
from twotower.kernels.attention import PagedKeyValues
from twotower.kernels.determinism import deterministic
from twotower.kernels.mamba_scan import MambaScanWeights
from twotower.kernels.moe import RouterRule, SlotOutputs
from twotower.kernels.rows import Rows
from twotower.towers.config.model_config import TwoTowerConfig
from twotower.towers.model.weights import (
    AttentionWeights,
    MambaWeights,
    MlpWeights,
    MoeWeights,
    TowerWeights,
)
from twotower.towers.state.context_state import ContextState
from twotower.towers.state.pages import pages_for
from twotower.towers.state.pool import StatePool
from twotower.towers.state.tensors import StateTensors

P = ParamSpec("P")
R = TypeVar("R")
AnyTower = TypeVar("AnyTower", bound="Tower")


def in_its_mode(
    method: Callable[Concatenate[AnyTower, P], R],
) -> Callable[Concatenate[AnyTower, P], R]:
    """The method of a tower, inside `deterministic` if the tower is. A graph that is
    captured around it keeps the kernels that were chosen."""

    @wraps(method)
    def run(tower: AnyTower, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if not tower.deterministic:
            return method(tower, *args, **kwargs)
        with deterministic():
            return method(tower, *args, **kwargs)

    return run


@dataclass(frozen=True)
class MixerInputs:
    """The rows of a pass, and the pool that holds their states. With `causal` a new token sees
    only the tokens before it, otherwise all of its row."""

    rows: Rows
    pool: StateTensors
    causal: bool


class Tower:
    """Weights of one tower on one device, and the steps of a pass.

    `reads_prompts` tells whether it extends states, or only reads them. With `deterministic` a row
    has the same bits in any pass on a GPU; on a CPU it always has.
    """

    reads_prompts: bool

    def __init__(
        self, config: TwoTowerConfig, weights: TowerWeights, *, deterministic: bool = False
    ) -> None:
        self.config = config
        self.deterministic = deterministic
        self.weights = weights
        self.device = weights.embedding.device
        self.dtype = weights.embedding.dtype
        if self.device.type == "cuda":
            # Long sums of few rows are split; their parts must not be rounded to bf16 between.
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        pattern = config.layer_pattern
        # States hold Mamba and attention layers apart: each layer's index among those of its kind.
        self._state_index = [pattern[:index].count(kind) for index, kind in enumerate(pattern)]

    def new_state(self, capacity: int) -> ContextState:
        """An empty state, or mirror, with room for `capacity` tokens, in a new pool."""
        return self.new_states(1, capacity)[0]

    def new_states(self, count: int, capacity: int) -> list[ContextState]:
        """Empty states that can share passes, in a new pool."""
        pages = count * pages_for(capacity)
        pool = StatePool(self.config, count, pages, self.device, self.dtype)
        return [pool.open(capacity) for _ in range(count)]

    @torch.inference_mode()
    @in_its_mode
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [M, H] -> logits [M, V] in the tower's dtype."""
        return dispatch.linear(hidden, self.weights.head)

    def pack(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Rows' token ids side by side on the tower's device, [T] int64."""
        return torch.tensor([token for row in tokens for token in row], device=self.device)

    def _mix(
        self, index: int, x: Tensor, inputs: MixerInputs, projected: Tensor | None = None
    ) -> tuple[Tensor | SlotOutputs, dict[str, Tensor]]:
        """Layer `index`'s mixer on its normed input x [T, H] -> its output [T, H], and views of
        what it would add to the rows' contexts by name: `xbc` [T, Cd] and `dt` [T, heads] of a
        Mamba layer, `k` and `v` [T, nkv, hd] of an attention layer. A Mamba layer's projection
        goes into `projected` if that is given."""
        mixer, pool = self.weights.layers[index].mixer, inputs.pool
        state_index = self._state_index[index]
        if isinstance(mixer, MambaWeights):
            states = pool.conv[:, state_index], pool.ssm[:, state_index]
            out, xbc, dt = mamba(x, mixer, self.config, inputs.rows, *states, projected)
            return out, {"xbc": xbc, "dt": dt}
        if isinstance(mixer, AttentionWeights):
            context = pool.layer_kv(state_index)
            out, k, v = attention(x, mixer, self.config, inputs.rows, context, inputs.causal)
            return out, {"k": k, "v": v}
        if isinstance(mixer, MoeWeights):
            return moe(x, mixer, self.config, inputs.rows), {}
        return mlp(x, mixer), {}


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
    y = dispatch.mamba_scan(projected, scan_weights(weights, config), conv_state, ssm_state, rows)
    widths = config.d_inner, config.conv_dim, config.mamba_num_heads
    z, xbc, dt = projected.split_with_sizes(widths, dim=-1)
    u = dispatch.gated_group_norm(y, z, weights.norm, config.n_groups, config.layer_norm_epsilon)
    return dispatch.linear(u, weights.out_proj, weights.out_proj_bias), xbc, dt


def scan_weights(weights: MambaWeights, config: TwoTowerConfig) -> MambaScanWeights:
    """Weights of a Mamba layer that `mamba_scan` reads: conv, A, D and dt_bias."""
    return MambaScanWeights(
        weights.conv_weight,
        weights.conv_bias,
        weights.a_log,
        weights.d,
        weights.dt_bias,
        config.n_groups,
    )


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
    q, k, v = qkv.split_with_sizes((heads, kv_heads, kv_heads), dim=1)
    out = dispatch.attention(q, k, v, context, rows, causal)
    return dispatch.linear(out, weights.o_proj, weights.o_proj_bias), k, v


def moe(x: Tensor, weights: MoeWeights, config: TwoTowerConfig, rows: Rows) -> Tensor | SlotOutputs:
    """Routed experts plus the shared MLP, [T, H] or what the next norm adds up."""
    rule = RouterRule(
        config.num_experts_per_tok,
        config.n_group,
        config.topk_group,
        config.norm_topk_prob,
        config.routed_scaling_factor,
    )
    routing = dispatch.route(
        x, weights.gate, weights.choice_bias, rule, rows.real, weights.narrow_gate
    )
    shared = weights.shared
    return dispatch.slot_outputs(x, routing, weights.up, weights.down, shared.up, shared.down)


def mlp(x: Tensor, weights: MlpWeights) -> Tensor:
    """down(relu(up x)^2)."""
    return dispatch.mlp(x, weights.up, weights.down, weights.up_bias, weights.down_bias)
