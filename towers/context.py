"""The context tower: causal and frozen; reads prompt and committed tokens into states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from twotower.kernels import dispatch
from twotower.kernels.replay import stack_weights
from twotower.towers.backbone import Tower, TowerPass, TowerWeights
from twotower.towers.config import MAMBA, TwoTowerConfig
from twotower.towers.layers import MambaWeights
from twotower.towers.packing import Packing
from twotower.towers.state import ContextState, LayerLog


def replay_shapes(config: TwoTowerConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a context tower's replay tensors, M layers each; empty if M is 0."""
    layers = len(config.layers_of(MAMBA))
    if not layers:
        return {}
    shapes: dict[str, tuple[int, ...]] = {
        "conv_weight": (layers, config.conv_dim, config.conv_kernel),
        "a_log": (layers, config.mamba_num_heads),
        "dt_bias": (layers, config.mamba_num_heads),
    }
    return {**shapes, "conv_bias": (layers, config.conv_dim)} if config.use_conv_bias else shapes


class ContextTower(Tower):
    """Extends rows' context states; with its head it is the plain autoregressive model, whose
    logits at a token predict the next one."""

    def __init__(self, config: TwoTowerConfig, weights: TowerWeights) -> None:
        super().__init__(config, weights)
        self.replay_weights = [
            layer.mixer.for_replay(config)
            for layer in weights.layers
            if isinstance(layer.mixer, MambaWeights)
        ]

    def replay_tensors(self) -> dict[str, Tensor]:
        """What a mirror needs to replay deltas of this tower; shapes as `replay_shapes`."""
        return stack_weights(self.replay_weights) if self.replay_weights else {}

    @torch.inference_mode()
    def forward(self, tokens: Sequence[Sequence[int]], states: Sequence[ContextState]) -> Tensor:
        """One pass over each row's next tokens -> final hidden states, packed, [T, H].

        Afterwards each state's log and K/V hold the new tokens; its snapshot has not moved.
        """
        packing = Packing([len(row) for row in tokens])
        reads = TowerPass(packing, states, [state.length for state in states], causal=True)
        hidden = self._embed(tokens)
        logs: list[LayerLog] = []
        for index, layer in enumerate(self.weights.layers):
            x = dispatch.rms_norm(hidden, layer.norm, self.config.layer_norm_epsilon)
            mixed = self._mix(index, x, reads)
            if mixed.log is not None:
                logs.append(mixed.log)
            for state, (k, v) in zip(states, mixed.kv, strict=bool(mixed.kv)):
                state.write_kv(self._places[index], k, v)
            hidden = hidden + mixed.output
        for row, state in enumerate(states):
            span = packing.slice_of(row)
            own = [LayerLog(log.xbc[span].clone(), log.dt[span].clone()) for log in logs]
            state.append(own, packing.lengths[row])
        return self._final_norm(hidden)

    @torch.inference_mode()
    def advance(self, state: ContextState, count: int) -> None:
        """Moves a state's snapshot over the first `count` tokens of its log."""
        state.advance(self.replay_weights, count)
