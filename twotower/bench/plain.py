"""A whole pass in plain PyTorch, to compare passes of the engines with, and to count experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.bench.plain_layers import (
    Layer,
    Modulation,
    attention_layer,
    mamba_layer,
    mlp_layer,
    moe_layer,
    rms_norm,
)
from twotower.kernels.moe import ExpertWeights
from twotower.kernels.quantized import QuantizedExperts
from twotower.towers.config.model_config import ATTENTION, MAMBA, TwoTowerConfig
from twotower.towers.model.backbone import Tower
from twotower.towers.model.denoiser_tower import DenoiserTower
from twotower.towers.model.weights import AttentionWeights, MambaWeights, MlpWeights, MoeWeights
from twotower.towers.state.context_state import ContextState

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class PlainState:
    """Copies of the states of B rows: per Mamba layer conv [B, K-1, Cd] and ssm [B, H, P, N], per
    attention layer K and V [B, nkv, S + L, hd] with room for a pass of L tokens."""

    conv: list[Tensor]
    ssm: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]


def copy_states(
    states: Sequence[ContextState], config: TwoTowerConfig, length: int, seen: int | None = None
) -> PlainState:
    """Copies states for a plain pass of `length` tokens a row; `seen` is the number of context
    tokens whose K/V are copied, None for all."""
    mamba, attention = len(config.layers_of(MAMBA)), len(config.layers_of(ATTENTION))
    stop = states[0].position if seen is None else min(seen, states[0].position)
    k, v = [], []
    for layer in range(attention):
        parts = [state.kv(layer, 0, stop) for state in states]
        k.append(F.pad(torch.stack([keys for keys, _ in parts]), (0, 0, 0, length)))
        v.append(F.pad(torch.stack([values for _, values in parts]), (0, 0, 0, length)))
    return PlainState(
        [torch.stack([state.conv[layer] for state in states]) for layer in range(mamba)],
        [torch.stack([state.ssm[layer] for state in states]) for layer in range(mamba)],
        k,
        v,
    )


class PlainPass:
    """Passes of one tower over rows of equal length, from copies of their states.

    In a denoiser, attention within a block is bidirectional and the states stay as they are; in a
    context tower it is causal and the Mamba states are advanced. `compiled` compiles a function
    per kind of layer.
    """

    def __init__(self, tower: Tower, state: PlainState, *, compiled: bool = False) -> None:
        self._tower = tower
        self._state = state
        self._causal = not isinstance(tower, DenoiserTower)
        self._mamba = _maybe_compiled(mamba_layer, compiled)
        self._attention = _maybe_compiled(attention_layer, compiled)
        self._moe = _maybe_compiled(moe_layer, compiled)
        self._mlp = _maybe_compiled(mlp_layer, compiled)
        self.experts_chosen: list[Tensor] = []

    @torch.inference_mode()
    def hidden(self, tokens: Tensor, modulation: Tensor | None = None) -> Tensor:
        """tokens [B, L], modulation [B, layers, 3, H] of a denoiser -> hidden states [B, L, H].

        Leaves each MoE layer's choice [B * L, k] in `experts_chosen`.
        """
        weights, config = self._tower.weights, self._tower.config
        self.experts_chosen = []
        mamba = attention = 0
        hidden = weights.embedding[tokens]
        for index, layer_weights in enumerate(weights.layers):
            kind, mixer = layer_weights.kind, layer_weights.mixer
            layer = Layer(config, layer_weights.norm, _modulation(modulation, index, kind))
            if isinstance(mixer, MambaWeights):
                conv, ssm = self._state.conv[mamba], self._state.ssm[mamba]
                hidden = self._mamba(hidden, layer, mixer, conv, ssm, self._causal)
                mamba += 1
            elif isinstance(mixer, AttentionWeights):
                k, v = self._state.k[attention], self._state.v[attention]
                hidden = self._attention(hidden, layer, mixer, k, v, self._causal)
                attention += 1
            elif isinstance(mixer, MoeWeights):
                up, down = (_stacked(experts, hidden.dtype) for experts in (mixer.up, mixer.down))
                hidden, ids = self._moe(hidden, layer, mixer, up, down)
                self.experts_chosen.append(ids)
            else:
                assert isinstance(mixer, MlpWeights)
                hidden = self._mlp(hidden, layer, mixer)
        return rms_norm(hidden, weights.final_norm, config.layer_norm_epsilon)

    @torch.inference_mode()
    def predict(self, tokens: Tensor, modulation: Tensor | None, wanted: Tensor) -> Tensor:
        """`hidden`, then the head at positions `wanted` [M] of all B * L; their best tokens [M]."""
        hidden = self.hidden(tokens, modulation).flatten(0, 1)
        return F.linear(hidden[wanted], self._tower.weights.head).argmax(-1)


def _maybe_compiled(function: Callable[P, R], compiled: bool) -> Callable[P, R]:
    return torch.compile(function, dynamic=False) if compiled else function


def _modulation(modulation: Tensor | None, index: int, kind: str) -> Modulation | None:
    if modulation is None:
        return None
    shift, scale, gate = modulation[:, index].unsqueeze(2).unbind(1)
    return Modulation(shift, scale, gate, kind in (MAMBA, ATTENTION))


def _stacked(experts: ExpertWeights, dtype: torch.dtype) -> Tensor:
    """Experts as one stacked tensor [E, out, in]; quantized experts are converted to `dtype`."""
    if isinstance(experts, QuantizedExperts):
        return experts.values.to(dtype) * experts.scale.to(dtype).unsqueeze(-1)
    if not isinstance(experts, Tensor):
        raise ValueError("experts: got a list, expected one stacked tensor per layer")
    return experts
