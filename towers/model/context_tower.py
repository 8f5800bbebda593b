"""The context tower: causal and frozen; reads prompt and committed tokens into states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.kernels import dispatch
from twotower.kernels.replay import ReplayWeights
from twotower.kernels.rows import Rows
from twotower.towers.config.model_config import MAMBA, TwoTowerConfig
from twotower.towers.model.backbone import MixerInputs, Tower, in_its_mode
from twotower.towers.model.weights import MambaWeights, TowerWeights
from twotower.towers.state.context_state import ContextState, rows_of
from twotower.towers.state.link import UpdateWriter
from twotower.towers.state.pass_log import PassLog


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


@dataclass(frozen=True)
class ContextOutput:
    """Output of a pass over rows' next tokens: final hidden states [T, H], the rows, and the log of
    all Mamba layers (None if there are none)."""

    hidden: Tensor
    rows: Rows
    log: PassLog | None


class ContextTower(Tower):
    """Extends rows' context states; with its head it is the plain autoregressive model, whose
    logits at a token predict the next one."""

    reads_prompts = True

    def __init__(
        self, config: TwoTowerConfig, weights: TowerWeights, *, deterministic: bool = False
    ) -> None:
        super().__init__(config, weights, deterministic=deterministic)
        mixers = [layer.mixer for layer in weights.layers if isinstance(layer.mixer, MambaWeights)]
        self.replay_weights = _stacked(mixers, config.n_groups) if mixers else None

    def replay_tensors(self) -> dict[str, Tensor]:
        """Weights by name with which a mirror replays deltas of this tower; shapes as
        `replay_shapes`."""
        return self.replay_weights.tensors() if self.replay_weights is not None else {}

    @torch.inference_mode()
    def forward(self, tokens: Sequence[Sequence[int]], states: Sequence[ContextState]) -> Tensor:
        """A pass over each row's next tokens -> final hidden states, packed, [T, H].

        Afterwards each state's log and K/V hold the new tokens; its snapshot has not moved.
        """
        return self.read(tokens, states).hidden

    @torch.inference_mode()
    def read(
        self,
        tokens: Sequence[Sequence[int]],
        states: Sequence[ContextState],
        sinks: Sequence[UpdateWriter | None] = (),
    ) -> ContextOutput:
        """As `forward`, with what `advance_rows` needs. Each row's sink, if it has one, takes every
        layer's share of the update before the next layer is computed: `xbc` and `dt`, or `k` and
        `v`."""
        pool, lengths = states[0].pool, list(map(len, tokens))
        rows = rows_of(states, lengths, [state.length for state in states])
        log = self.new_log(rows.host.total)
        hidden = self.run(self.pack(tokens), MixerInputs(rows, pool, True), log, _listening(sinks))
        for row, (state, length) in enumerate(zip(states, lengths, strict=True)):
            start = rows.host.cu_seqlens[row]
            state.append(log.part(start, start + length) if log is not None else None, length)
        return ContextOutput(hidden, rows, log)

    @in_its_mode
    def run(
        self,
        tokens: Tensor,
        inputs: MixerInputs,
        log: PassLog | None,
        sinks: Sequence[UpdateWriter | None] = (),
    ) -> Tensor:
        """The pass over tensors alone: tokens [T] -> final hidden states [T, H]. Writes the rows'
        K/V and `log`, and hands shares to `sinks`."""
        hidden, out = self.weights.embedding[tokens], None
        eps = self.config.layer_norm_epsilon
        for index, layer in enumerate(self.weights.layers):
            hidden, x = dispatch.add_norm(hidden, out, None, layer.norm, eps, None, False)
            out, added = self._mix(index, x, inputs, self._projected(index, log))
            self._keep(self._state_index[index], added, inputs, log, sinks)
        final = self.weights.final_norm
        return dispatch.add_norm(hidden, out, None, final, eps, None, False)[1]

    def new_log(self, tokens: int, *, whole: bool = False) -> PassLog | None:
        """An empty log for a pass over `tokens` tokens; None without Mamba layers.

        A `whole` log holds all that the layers project, so that nothing is copied into it.
        """
        config, layers = self.config, len(self.config.layers_of(MAMBA))
        if not layers:
            return None
        widths = (config.d_inner if whole else 0, config.conv_dim, config.mamba_num_heads)
        shape = (layers, tokens, sum(widths))
        if whole:
            projected = torch.empty(shape, device=self.device, dtype=self.dtype)
            _, xbc, dt = projected.split(widths, dim=-1)
            return PassLog(xbc, dt, projected)
        xbc, dt = (
            torch.empty(layers, tokens, width, device=self.device, dtype=self.dtype)
            for width in widths[1:]
        )
        return PassLog(xbc, dt)

    @torch.inference_mode()
    def advance(self, state: ContextState, count: int) -> None:
        """Moves a state's snapshot over the first `count` tokens of its log."""
        state.advance(self.replay_weights, count)

    @torch.inference_mode()
    def advance_rows(
        self,
        passed: ContextOutput,
        states: Sequence[ContextState],
        counts: Sequence[int],
        sinks: Sequence[UpdateWriter | None],
    ) -> None:
        """Moves the snapshots of a pass's rows over their first `counts` new tokens; each sink
        takes every layer's new `conv` and `ssm` before the next layer is replayed."""
        pool, weights, log = states[0].pool, self.replay_weights, passed.log
        if log is not None and weights is not None and any(counts):
            # Rows behind those of the states are padding.
            padded = [*counts, *[0] * (passed.rows.count - len(counts))]
            moved = torch.tensor(padded, dtype=torch.int32, device=self.device)
            listening = _listening(sinks)
            # All layers in one go where no sink waits for a layer.
            each = [slice(layer, layer + 1) for layer in range(len(weights))]
            for layers in each if listening else [slice(None)]:
                log.replay(pool, weights, passed.rows, moved, layers)
                for state, sink in zip(states, listening, strict=False):
                    if sink is not None:
                        sink.put("conv", layers.start, state.conv[layers.start])
                        sink.put("ssm", layers.start, state.ssm[layers.start])
        for state, count, sink in zip(states, counts, sinks, strict=True):
            state.advanced(count, exported=sink is not None)

    def _projected(self, index: int, log: PassLog | None) -> Tensor | None:
        """The part of a `whole` log into which a Mamba layer projects; None for another log."""
        if log is None or log.projected is None or self.config.layer_pattern[index] != MAMBA:
            return None
        return log.projected[self._state_index[index]]

    def _keep(
        self,
        layer: int,
        added: Mapping[str, Tensor],
        inputs: MixerInputs,
        log: PassLog | None,
        sinks: Sequence[UpdateWriter | None],
    ) -> None:
        """Puts a layer's new projections into the log, or its new K/V into the pages, and hands
        each row's share to its sink. `layer` counts layers of one kind."""
        if "xbc" in added:
            assert log is not None
            if log.projected is None:
                log.xbc[layer].copy_(added["xbc"])
                log.dt[layer].copy_(added["dt"])
            added = {"xbc": log.xbc[layer], "dt": log.dt[layer]}
        if "k" in added:
            context = inputs.pool.layer_kv(layer)
            dispatch.store_kv(added["k"], added["v"], context, inputs.rows)
        for row, sink in enumerate(sinks):
            if sink is None:
                continue
            span = inputs.rows.host.slice_of(row)
            for name, tensor in added.items():
                share = tensor[span]
                # K/V are sent by head, as they lie in the pages.
                if name in ("k", "v"):
                    share = share.transpose(0, 1).contiguous()
                sink.put(name, layer, share)


def _listening(sinks: Sequence[UpdateWriter | None]) -> list[UpdateWriter | None]:
    """Each row's sink, None for a sink that takes no shares; empty if no sink does."""
    taking = [sink if sink is not None and sink.takes_shares else None for sink in sinks]
    return taking if any(sink is not None for sink in taking) else []


def _stacked(mixers: Sequence[MambaWeights], groups: int) -> ReplayWeights:
    """The replay weights of all Mamba layers."""
    biases = [mixer.conv_bias for mixer in mixers if mixer.conv_bias is not None]
    tensors = {
        "conv_weight": torch.stack([mixer.conv_weight for mixer in mixers]),
        "a_log": torch.stack([mixer.a_log for mixer in mixers]),
        "dt_bias": torch.stack([mixer.dt_bias for mixer in mixers]),
    }
    if biases:
        tensors["conv_bias"] = torch.stack(biases)
    return ReplayWeights.from_tensors(tensors, groups)
