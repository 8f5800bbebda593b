"""Towers of random weights, drawn on their device tensor by tensor, without a file or a copy.

Every matrix is drawn so that inputs of unit variance give outputs of unit variance; decays and time
steps have the sizes of trained ones. So activations stay finite at any depth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.kernels.causal_conv1d import tap_major
from twotower.kernels.moe import ExpertWeights, narrow_parts
from twotower.kernels.quantized import ExpertProducts, quantize
from twotower.towers.config.model_config import (
    ATTENTION,
    MAMBA,
    MOE,
    TIMESTEP_FEATURES,
    TwoTowerConfig,
)
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.model.denoiser_tower import DenoiserTower
from twotower.towers.model.weights import (
    AttentionWeights,
    LayerWeights,
    MambaWeights,
    Mixer,
    MlpWeights,
    MoeWeights,
    TimestepWeights,
    TowerWeights,
)

EXPERT_FORMATS = ("full", "fp8")
# softplus(-3) = 0.05 is in the middle of the time steps that training starts from.
_DT_BIAS = -3.0
_SMALL = 0.02


@dataclass(frozen=True)
class TowerMaker:
    """Draws the weights of towers of one shape from one generator.

    `experts` is the format of routed experts: `full` for `dtype`, as all other weights, or `fp8`,
    which is multiplied as `expert_products` says. Routers get narrow parts on a GPU, and with
    `narrow` anywhere. `deterministic` is the towers'.
    """

    config: TwoTowerConfig
    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator
    experts: str = "full"
    narrow: bool = False
    expert_products: ExpertProducts = "widened"
    deterministic: bool = False

    def context(self) -> ContextTower:
        """A context tower with its head."""
        return ContextTower(self.config, self._tower(), deterministic=self.deterministic)

    def denoiser(self) -> DenoiserTower:
        """A denoiser tower with its head and timestep conditioning."""
        hidden, layers = self.config.hidden_size, self.config.num_layers
        table = self._normal(layers, 3, hidden, scale=_SMALL)
        table[:, 2] += 1.0
        timestep = TimestepWeights(
            first=self._matrix(hidden, TIMESTEP_FEATURES),
            first_bias=self._normal(hidden, scale=_SMALL),
            second=self._matrix(hidden, hidden),
            second_bias=self._normal(hidden, scale=_SMALL),
            projection=self._normal(3 * hidden, hidden, scale=_SMALL / math.sqrt(hidden)),
            projection_bias=self._normal(3 * hidden, scale=_SMALL),
            table=table,
        )
        weights = self._tower()
        return DenoiserTower(self.config, weights, timestep, deterministic=self.deterministic)

    def _tower(self) -> TowerWeights:
        config = self.config
        return TowerWeights(
            embedding=self._normal(config.vocab_size, config.hidden_size),
            layers=tuple(
                LayerWeights(kind, self._ones(config.hidden_size), self._mixer(kind))
                for kind in config.layer_pattern
            ),
            final_norm=self._ones(config.hidden_size),
            head=self._matrix(config.vocab_size, config.hidden_size),
        )

    def _mixer(self, kind: str) -> Mixer:
        if kind == MAMBA:
            return self._mamba()
        if kind == ATTENTION:
            return self._attention()
        if kind == MOE:
            return self._moe()
        return self._mlp(self.config.intermediate_size, biased=self.config.mlp_bias)

    def _mamba(self) -> MambaWeights:
        config, wide = self.config, torch.float32
        heads, inner = config.mamba_num_heads, config.d_inner
        projected = inner + config.conv_dim + heads
        taps = self._matrix(config.conv_dim, config.conv_kernel)
        rates = torch.rand(heads, device=self.device, dtype=wide, generator=self.generator)
        return MambaWeights(
            in_proj=self._matrix(projected, config.hidden_size),
            in_proj_bias=self._bias(projected, config.use_bias),
            conv_weight=tap_major(taps),
            conv_bias=self._bias(config.conv_dim, config.use_conv_bias),
            a_log=torch.log(1.0 + 15.0 * rates),
            d=torch.ones(heads, device=self.device, dtype=wide),
            dt_bias=self._normal(heads, dtype=wide) + _DT_BIAS,
            norm=self._ones(inner),
            out_proj=self._matrix(config.hidden_size, inner),
            out_proj_bias=self._bias(config.hidden_size, config.use_bias),
        )

    def _attention(self) -> AttentionWeights:
        config = self.config
        queries = config.num_attention_heads * config.head_dim
        projected = queries + 2 * config.num_key_value_heads * config.head_dim
        return AttentionWeights(
            qkv=self._matrix(projected, config.hidden_size),
            qkv_bias=self._bias(projected, config.attention_bias),
            o_proj=self._matrix(config.hidden_size, queries),
            o_proj_bias=self._bias(config.hidden_size, config.attention_bias),
        )

    def _moe(self) -> MoeWeights:
        config = self.config
        count, hidden = config.n_routed_experts, config.hidden_size
        gate = self._matrix(count, hidden).double()
        return MoeWeights(
            gate=gate,
            choice_bias=torch.zeros(count, device=self.device, dtype=torch.float32),
            up=self._experts(config.moe_intermediate_size, hidden),
            down=self._experts(hidden, config.moe_intermediate_size),
            shared=self._mlp(config.moe_shared_expert_intermediate_size),
            narrow_gate=narrow_parts(gate) if self.narrow or self.device.type == "cuda" else None,
        )

    def _experts(self, outputs: int, inputs: int) -> ExpertWeights:
        scale = 1.0 / math.sqrt(inputs)
        stacked = self._normal(self.config.n_routed_experts, outputs, inputs, scale=scale)
        return quantize(stacked, self.expert_products) if self.experts == "fp8" else stacked

    def _mlp(self, width: int, *, biased: bool = False) -> MlpWeights:
        hidden = self.config.hidden_size
        return MlpWeights(
            up=self._matrix(width, hidden),
            up_bias=self._bias(width, biased),
            down=self._matrix(hidden, width),
            down_bias=self._bias(hidden, biased),
        )

    def _matrix(self, outputs: int, inputs: int) -> Tensor:
        return self._normal(outputs, inputs, scale=1.0 / math.sqrt(inputs))

    def _bias(self, size: int, present: bool) -> Tensor | None:
        return self._normal(size, scale=_SMALL) if present else None

    def _ones(self, size: int) -> Tensor:
        return torch.ones(size, device=self.device, dtype=self.dtype)

    def _normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        out = torch.empty(shape, device=self.device, dtype=dtype or self.dtype)
        return out.normal_(0.0, scale, generator=self.generator)
