"""A tiny model whose weights are a formula: the self-test of a device runs it.

It has every kind of layer and the widths of heads and states of the released model, so that the
kernels run as they do there. A weight is a whole number of at most 15, times a power of two for its
tensor: exact in fp32, bf16 and the 8 bits of experts alike, so that one recording serves them all.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

from twotower.kernels.quantized import ExpertProducts
from twotower.towers.checkpoint.checkpoint import tensor_shapes
from twotower.towers.checkpoint.tower_loader import TowerLoader
from twotower.towers.config.model_config import TwoTowerConfig
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.model.denoiser_tower import DenoiserTower

# The experts come first: what they are chosen by is then the token alone, and not what the layers
# before them have rounded.
FORMULA_CONFIG = TwoTowerConfig(
    vocab_size=96,
    hidden_size=128,
    layer_pattern="EM*-",
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=128,
    mamba_num_heads=2,
    mamba_head_dim=64,
    n_groups=2,
    ssm_state_size=128,
    conv_kernel=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    moe_shared_expert_intermediate_size=128,
    intermediate_size=128,
    n_group=1,
    topk_group=1,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    layer_norm_epsilon=1e-5,
    max_position_embeddings=1024,
)
_MOST = 15
# Standard deviation of whole numbers from -15 to 15.
_SPREAD = 8.9
_WORD = 0xFFFFFFFF


def formula_towers(
    device: torch.device,
    dtype: torch.dtype,
    quantized_experts: bool = False,
    for_triton: bool | None = None,
    expert_products: ExpertProducts = "widened",
    deterministic: bool = False,
) -> tuple[ContextTower, DenoiserTower]:
    """Both towers of the tiny model, as a checkpoint's would be loaded; see `load_context_tower`.
    With `quantized_experts` their experts are in 8 bits, of the same values."""
    weights_by_name = FormulaWeights(quantized_experts)
    loader = TowerLoader(weights_by_name, device, dtype, for_triton, expert_products)
    own = loader.tower("context_tower", "context_lm_head")
    context = ContextTower(loader.config, own, deterministic=deterministic)
    own, timestep = loader.tower("denoiser_tower", "lm_head"), loader.timestep()
    denoiser = DenoiserTower(loader.config, own, timestep, deterministic=deterministic)
    return context, denoiser


class FormulaWeights:
    """The tiny model's tensors by name, in place of a checkpoint."""

    name = "the self-test's model"

    def __init__(self, quantized_experts: bool) -> None:
        self.config = _with_experts(quantized_experts)
        self._shapes = tensor_shapes(self.config)

    def read(self, name: str, target: Tensor) -> None:
        """Fills `target` with a tensor."""
        scale = 1.0
        if self.config.quantized_experts and ".experts." in name:
            scale = _power_of_two(self._shapes[name.removesuffix("_scale")])
        if name.endswith("_scale"):
            target.fill_(scale)
        else:
            target.copy_((_values(name, self._shapes[name]) / scale).view(target.shape))

    def lying(self, name: str, dtype: torch.dtype) -> None:
        """None: every tensor is computed."""


def _with_experts(quantized: bool) -> TwoTowerConfig:
    return TwoTowerConfig(**{**FORMULA_CONFIG.__dict__, "quantized_experts": quantized})


def _values(name: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor in fp32: matrices with a spread of 1/sqrt(fan-in), others about as usual."""
    whole = whole_numbers(name, shape)
    if name.endswith("A_log"):
        return 1.5 + whole / 8
    if name.endswith("dt_bias"):
        return -3.0 + whole / 8
    if name.endswith(("norm.weight", "norm_f.weight", ".D")):
        return 1.0 + whole / 64
    if name.startswith("scale_shift_tables"):
        return torch.tensor([[0.0], [0.0], [1.0]]) + whole / 128
    if "embeddings" in name:
        return whole / 8
    if name.endswith("gate.weight"):
        return whole * 2 * _power_of_two(shape)
    return whole * (_power_of_two(shape) if len(shape) > 1 else 1 / 128)


def _power_of_two(shape: tuple[int, ...]) -> float:
    """What brings whole numbers of a matrix to a spread of about 1/sqrt(fan-in)."""
    fan_in = math.prod(shape[1:])
    return float(2.0 ** -round(math.log2(_SPREAD * math.sqrt(fan_in))))


def whole_numbers(name: str, shape: tuple[int, ...]) -> Tensor:
    """Whole numbers from -15 to 15 in fp32, by the name and each one's place."""
    word = torch.arange(math.prod(shape), dtype=torch.int64)
    word = (word * 0x9E3779B1 + zlib.crc32(name.encode())) & _WORD
    word = ((word ^ (word >> 15)) * 0x85EBCA6B) & _WORD
    word = ((word ^ (word >> 13)) * 0xC2B2AE35) & _WORD
    return ((word >> 8) % (2 * _MOST + 1) - _MOST).view(shape).float()
