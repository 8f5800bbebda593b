"""The hybrid Mamba / attention / MoE stack: what both towers share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.kernels import dispatch
from twotower.towers import layers
from twotower.towers.config import TwoTowerConfig
from twotower.towers.layers import AttentionWeights, LayerWeights, MambaWeights, MoeWeights
from twotower.towers.memory import StatePool, pages_for
from twotower.towers.packing import Packing
from twotower.towers.state import ContextState, LayerLog


@dataclass(frozen=True)
class TowerWeights:
    """Embedding and head [V, H], final norm [H] and the layers of one tower."""

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor
    head: Tensor


@dataclass(frozen=True)
class TowerPass:
    """What the mixers of one pass read: rows' tokens and states, the number of context tokens that
    each row's attention sees, and whether new tokens see only those before them."""

    packing: Packing
    states: Sequence[ContextState]
    visible: Sequence[int]
    causal: bool


@dataclass(frozen=True)
class Mixed:
    """A mixer's output [T, H], and what it would add to the rows' contexts: the log of a Mamba
    layer, or K/V [nkv, L, hd] per row of an attention layer."""

    output: Tensor
    log: LayerLog | None = None
    kv: Sequence[tuple[Tensor, Tensor]] = ()


class Tower:
    """Weights of one tower on one device, and the steps of a pass."""

    def __init__(self, config: TwoTowerConfig, weights: TowerWeights) -> None:
        self.config = config
        self.weights = weights
        self.device = weights.embedding.device
        self.dtype = weights.embedding.dtype
        pattern = config.layer_pattern
        # A state holds its Mamba and attention layers by their place among their own kind.
        self._places = [pattern[:index].count(kind) for index, kind in enumerate(pattern)]

    def new_state(self, capacity: int) -> ContextState:
        """An empty state, or mirror, with room for `capacity` tokens, in a pool of its own."""
        pool = StatePool(self.config, 1, pages_for(capacity), self.device, self.dtype)
        return pool.open(capacity)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [M, H] -> fp32 logits [M, V]."""
        return dispatch.linear(hidden, self.weights.head).float()

    def _embed(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        flat = torch.tensor([token for row in tokens for token in row], device=self.device)
        return self.weights.embedding[flat]

    def _final_norm(self, hidden: Tensor) -> Tensor:
        return dispatch.rms_norm(hidden, self.weights.final_norm, self.config.layer_norm_epsilon)

    def _mix(self, index: int, x: Tensor, reads: TowerPass) -> Mixed:
        """Layer `index`'s mixer on its normed input x [T, H]."""
        mixer, place = self.weights.layers[index].mixer, self._places[index]
        if isinstance(mixer, MambaWeights):
            histories = [state.conv[place] for state in reads.states]
            ssm = [state.ssm[place] for state in reads.states]
            return Mixed(*layers.mamba(x, mixer, self.config, reads.packing, histories, ssm))
        if isinstance(mixer, AttentionWeights):
            contexts = [
                state.context_kv(place, seen)
                for state, seen in zip(reads.states, reads.visible, strict=True)
            ]
            out, kv = layers.attention(x, mixer, self.config, reads.packing, contexts, reads.causal)
            return Mixed(out, kv=kv)
        if isinstance(mixer, MoeWeights):
            return Mixed(layers.moe(x, mixer, self.config))
        return Mixed(layers.mlp(x, mixer))
