"""The denoiser tower: fills a block, reading the context tower's state layer by layer."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from twotower.kernels import dispatch
from twotower.kernels.elementwise import silu
from twotower.kernels.norm import Modulation
from twotower.towers.config.model_config import ATTENTION, MAMBA, TIMESTEP_FEATURES, TwoTowerConfig
from twotower.towers.model.backbone import MixerInputs, Tower, in_its_mode
from twotower.towers.model.weights import TimestepWeights, TowerWeights
from twotower.towers.state.context_state import ContextState, rows_of

_TIMESTEP_SCALE = 1000.0
_TIMESTEP_BASE = 10000.0
# A block of L tokens has L timesteps; 256 entries serve every usual mix of block sizes.
_CACHED_TIMESTEPS = 256


class DenoiserTower(Tower):
    """Predicts the tokens of blocks from rows' context states, which it only reads; its logits at
    a position predict that position's own token."""

    reads_prompts = False

    def __init__(
        self,
        config: TwoTowerConfig,
        weights: TowerWeights,
        timestep: TimestepWeights,
        *,
        deterministic: bool = False,
    ) -> None:
        super().__init__(config, weights, deterministic=deterministic)
        self.timestep = timestep
        self._modulations: OrderedDict[float, Tensor] = OrderedDict()
        self._plain = torch.zeros_like(timestep.table)
        self._plain[:, 2] = 1.0

    @torch.inference_mode()
    def forward(
        self,
        tokens: Sequence[Sequence[int]],
        timesteps: Sequence[float | None],
        states: Sequence[ContextState],
        observe: Callable[[str, Tensor], None] | None = None,
    ) -> Tensor:
        """One pass over each row's block -> final hidden states, packed, [T, H].

        A timestep in [0, 1] is the row's masked fraction; None runs the layers plain, without
        modulation or gate. Each row sees its state at `state.position` tokens. `observe` is shown
        `hidden_in.{i}` and `mixer_in.{i}` of every layer and `hidden_out`, each [T, H].
        """
        pool = states[0].pool
        # Up to the snapshot, not to the log's end: mock_ar keeps its last token in the log.
        rows = rows_of(states, list(map(len, tokens)), [state.position for state in states])
        distinct = list(dict.fromkeys(timesteps))
        table = torch.stack([self.modulation(t) for t in distinct])
        entries = [distinct.index(t) for t in timesteps]
        spread = [e for e, row in zip(entries, tokens, strict=True) for _ in row]
        index = torch.tensor(spread, device=self.device)
        return self.run(self.pack(tokens), table, index, MixerInputs(rows, pool, False), observe)

    @in_its_mode
    def run(
        self,
        tokens: Tensor,
        table: Tensor,
        index: Tensor,
        inputs: MixerInputs,
        observe: Callable[[str, Tensor], None] | None = None,
    ) -> Tensor:
        """`forward` over tensors alone: tokens [T], `table` [n, layers, 3, H] of modulations and
        the entry of each token, `index` [T] int64 -> [T, H]."""
        hidden, out, gate = self.weights.embedding[tokens], None, None
        eps = self.config.layer_norm_epsilon
        for layer_index, layer in enumerate(self.weights.layers):
            modulation = Modulation(table[:, layer_index], index)
            first = layer.kind in (MAMBA, ATTENTION)
            hidden, x = dispatch.add_norm(hidden, out, gate, layer.norm, eps, modulation, first)
            if observe is not None:
                observe(f"hidden_in.{layer_index}", hidden)
                observe(f"mixer_in.{layer_index}", x)
            (out, _), gate = self._mix(layer_index, x, inputs), modulation
        hidden, x = dispatch.add_norm(hidden, out, gate, self.weights.final_norm, eps, None, False)
        if observe is not None:
            observe("hidden_out", hidden)
        return x

    @torch.inference_mode()
    def modulation(self, timestep: float | None) -> Tensor:
        """Shift, scale and gate of every layer at a timestep, [layers, 3, H]; cached."""
        if timestep is None:
            return self._plain
        known = self._modulations.get(timestep)
        if known is None:
            embedded = self.embed_timestep(timestep).view(3, -1)
            known = self.timestep.table + embedded
            self._modulations[timestep] = known
            if len(self._modulations) > _CACHED_TIMESTEPS:
                self._modulations.popitem(last=False)
        self._modulations.move_to_end(timestep)
        return known

    @torch.inference_mode()
    @in_its_mode
    def embed_timestep(self, timestep: float) -> Tensor:
        """t_emb of one timestep, [1, 3 H]: shift, scale and gate thirds shared by all layers."""
        represented = silu(self.represent_timestep(timestep))
        return dispatch.linear(represented, self.timestep.projection, self.timestep.projection_bias)

    @torch.inference_mode()
    @in_its_mode
    def represent_timestep(self, timestep: float) -> Tensor:
        """t_repr of one timestep, its features through the timestep MLP, [1, H]."""
        weights = self.timestep
        features = timestep_features(timestep, self.dtype, self.device)
        hidden = silu(dispatch.linear(features, weights.first, weights.first_bias))
        return dispatch.linear(hidden, weights.second, weights.second_bias)


def timestep_features(timestep: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Cosines, then sines, of 1000 t over 128 frequencies from 1 down to 1/10000, [1, 256].

    In bf16 both t and 1000 t are rounded to bf16, as in training. Source: Vaswani et al. 2017,
    section 3.5, as used by DiT.
    """
    half = TIMESTEP_FEATURES // 2
    exponent = -math.log(_TIMESTEP_BASE) * torch.arange(half, dtype=torch.float32) / half
    scaled = (torch.tensor(timestep, dtype=dtype) * _TIMESTEP_SCALE).float()
    angles = scaled * torch.exp(exponent)
    return torch.cat((torch.cos(angles), torch.sin(angles))).to(device, dtype).unsqueeze(0)
