"""The hybrid Mamba / attention / MoE stack: what both towers share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from twotower.kernels import dispatch
from twotower.kernels.rows import Rows
from twotower.towers.config.model_config import TwoTowerConfig
from twotower.towers.model import layers
from twotower.towers.model.layers import AttentionWeights, LayerWeights, MambaWeights, MoeWeights
from twotower.towers.state.context_state import ContextState
from twotower.towers.state.pages import pages_for
from twotower.towers.state.pool import StatePool
from twotower.towers.state.tensors import StateTensors


@dataclass(frozen=True)
class TowerWeights:
    """Embedding and head [V, H], final norm [H] and the layers of one tower."""

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor
    head: Tensor


@dataclass(frozen=True)
class MixerInputs:
    """What the mixers of one pass read: where the rows' tokens, states and visible context are,
    and whether new tokens see only those before them."""

    rows: Rows
    pool: StateTensors
    causal: bool


@dataclass(frozen=True)
class MixerOutput:
    """A mixer's output [T, H], and views of what it would add to the rows' contexts: `xbc` [T, Cd]
    and `dt` [T, heads] of a Mamba layer, `k` and `v` [T, nkv, hd] of an attention layer."""

    output: Tensor
    added: Mapping[str, Tensor] = field(default_factory=dict)


class Tower:
    """Weights of one tower on one device, and the steps of a pass.

    `reads_prompts` tells whether it extends states, or only reads them.
    """

    reads_prompts: bool

    def __init__(self, config: TwoTowerConfig, weights: TowerWeights) -> None:
        self.config = config
        self.weights = weights
        self.device = weights.embedding.device
        self.dtype = weights.embedding.dtype
        if self.device.type == "cuda":
            # Long sums of few rows are split; their parts are not to be rounded to bf16 between.
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        pattern = config.layer_pattern
        # A state holds its Mamba and attention layers by their place among their own kind.
        self._places = [pattern[:index].count(kind) for index, kind in enumerate(pattern)]

    def new_state(self, capacity: int) -> ContextState:
        """An empty state, or mirror, with room for `capacity` tokens, in a pool of its own."""
        return self.new_states(1, capacity)[0]

    def new_states(self, count: int, capacity: int) -> list[ContextState]:
        """Empty states that can share passes, in a pool of their own."""
        pages = count * pages_for(capacity)
        pool = StatePool(self.config, count, pages, self.device, self.dtype)
        return [pool.open(capacity) for _ in range(count)]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [M, H] -> logits [M, V] in the tower's dtype."""
        return dispatch.linear(hidden, self.weights.head)

    def pack(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Rows' token ids side by side on the tower's device, [T] int64."""
        return torch.tensor([token for row in tokens for token in row], device=self.device)

    def _mix(
        self, index: int, x: Tensor, inputs: MixerInputs, projected: Tensor | None = None
    ) -> MixerOutput:
        """Layer `index`'s mixer on its normed input x [T, H]; a Mamba layer's projection goes into
        `projected` if that is given."""
        mixer, place, pool = self.weights.layers[index].mixer, self._places[index], inputs.pool
        if isinstance(mixer, MambaWeights):
            states = pool.conv[:, place], pool.ssm[:, place]
            out, xbc, dt = layers.mamba(x, mixer, self.config, inputs.rows, *states, projected)
            return MixerOutput(out, {"xbc": xbc, "dt": dt})
        if isinstance(mixer, AttentionWeights):
            context = pool.layer_kv(place)
            out, k, v = layers.attention(x, mixer, self.config, inputs.rows, context, inputs.causal)
            return MixerOutput(out, {"k": k, "v": v})
        if isinstance(mixer, MoeWeights):
            return MixerOutput(layers.moe(x, mixer, self.config, inputs.rows))
        return MixerOutput(layers.mlp(x, mixer))
