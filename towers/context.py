"""The context tower: causal and frozen; reads prompt and committed tokens into states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from twotower.kernels import dispatch
from twotower.kernels.replay import stack_weights
from twotower.towers.backbone import Mixed, Tower, TowerPass, TowerWeights
from twotower.towers.config import MAMBA, TwoTowerConfig
from twotower.towers.layers import MambaWeights
from twotower.towers.packing import Packing
from twotower.towers.protocols import LayerSink
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
    def forward(
        self,
        tokens: Sequence[Sequence[int]],
        states: Sequence[ContextState],
        sinks: Sequence[LayerSink | None] = (),
    ) -> Tensor:
        """One pass over each row's next tokens -> final hidden states, packed, [T, H].

        Afterwards each state's log and K/V hold the new tokens; its snapshot has not moved. Each
        row's sink, if it has one, takes every layer's share of what is new before the next layer
        is computed: `xbc` and `dt`, or `k` and `v`.
        """
        packing = Packing([len(row) for row in tokens])
        reads = TowerPass(packing, states, [state.length for state in states], causal=True)
        hidden = self._embed(tokens)
        logs: list[list[LayerLog]] = [[] for _ in states]
        takers = sinks or [None] * len(states)
        for index, layer in enumerate(self.weights.layers):
            x = dispatch.rms_norm(hidden, layer.norm, self.config.layer_norm_epsilon)
            mixed = self._mix(index, x, reads)
            for row, (state, log, sink) in enumerate(zip(states, logs, takers, strict=True)):
                added = _add_to_row(self._places[index], mixed, row, packing, state, log)
                if sink is not None:
                    for name, tensor in added.items():
                        sink.put(name, self._places[index], tensor)
            hidden = hidden + mixed.output
        for log, count, state in zip(logs, packing.lengths, states, strict=True):
            state.append(log, count)
        return self._final_norm(hidden)

    @torch.inference_mode()
    def advance(self, state: ContextState, count: int, sink: LayerSink | None = None) -> None:
        """Moves a state's snapshot over the first `count` tokens of its log; `sink` takes each
        layer's new `conv` and `ssm` before the next layer is replayed."""
        state.advance(self.replay_weights, count, sink)


def _add_to_row(
    place: int, mixed: Mixed, row: int, packing: Packing, state: ContextState, log: list[LayerLog]
) -> dict[str, Tensor]:
    """Puts a layer's share of a pass into a row's log or K/V; returns its tensors by name."""
    if mixed.log is not None:
        span = packing.slice_of(row)
        # Copies: views would keep the layer's whole projection until the row's next pass.
        own = LayerLog(mixed.log.xbc[span].clone(), mixed.log.dt[span].clone())
        log.append(own)
        return {"xbc": own.xbc, "dt": own.dt}
    if mixed.kv:
        k, v = mixed.kv[row]
        state.write_kv(place, k, v)
        return {"k": k, "v": v}
    return {}
