"""Experts stored in 8 bits: float8 e4m3 values with one scale per output channel.

    weight[e, n, k] = values[e, n, k] * scale[e, n]

Two ways to multiply them with x. `widened`: arithmetic stays in x's dtype, values are widened after
the load and the scale multiplies the finished sum, so a product differs from that of the stored
weights by rounding alone. `fp8`: x is quantized too, one scale per token, and the products of 8-bit
values are summed in fp32.

    y[t, n] = (sum_k x_values[t, k] * values[e, n, k]) * scale[e, n] * x_scale[t]

Sources: Micikevicius et al. 2022, "FP8 formats for deep learning", section 3; Liu et al. 2024
(DeepSeek-V3), section 3.3.2, for scales that are found as the activations come.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
ExpertProducts = Literal["widened", "fp8"]
EXPERT_PRODUCTS: tuple[ExpertProducts, ...] = get_args(ExpertProducts)
# Largest values below this have no normal number as their scale.
LEAST_LARGEST = FP8_MAX * torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class QuantizedExperts:
    """A matrix [N, K] per expert: `values` [E, N, K] float8 e4m3, `scale` [E, N] fp32; `products`
    is the way in which they are multiplied."""

    values: Tensor
    scale: Tensor
    products: ExpertProducts = "widened"

    def __len__(self) -> int:
        return self.values.shape[0]

    def __getitem__(self, expert: int) -> Tensor:
        """One expert's matrix [N, K], fp32."""
        return self.values[expert].float() * self.scale[expert].unsqueeze(1)


def quantize(weight: Tensor, products: ExpertProducts = "widened") -> QuantizedExperts:
    """weight [E, N, K] -> the nearest 8-bit values; a channel's largest becomes +-FP8_MAX.

    A channel of zeros or subnormal numbers gets scale 1. Raises ValueError for values that are not
    finite.
    """
    values, scale = _scaled(weight.float())
    if not bool(torch.isfinite(scale).all()):
        raise ValueError("weight: got values that are not finite, expected finite ones")
    return QuantizedExperts(values, scale, products)


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, K] -> the nearest 8-bit values [T, K] and their scales [T] fp32; a token's largest
    value becomes +-FP8_MAX.

    A token of zeros or subnormal numbers gets scale 1. One with a value that is not finite gets
    values 0 and scale NaN: e4m3 has no infinity, and so all of its products are NaN.
    """
    return _scaled(x.float())


def widen(values: Tensor) -> Tensor:
    """float8 e4m3 values as fp32, by a table: on a CPU torch converts them one by one."""
    codes = values.view(torch.uint8).flatten().int()
    return _WIDE.to(values.device).index_select(0, codes).view(values.shape)


def _scaled(wide: Tensor) -> tuple[Tensor, Tensor]:
    """wide [..., K] fp32 -> 8-bit values and scales [...], NaN where a value is not finite."""
    largest = wide.abs().amax(-1)
    scale = torch.where(largest > LEAST_LARGEST, largest / FP8_MAX, torch.ones_like(largest))
    finite = torch.isfinite(largest)
    scale = scale.masked_fill(~finite, torch.nan)
    quotient = (wide / scale.unsqueeze(-1)).masked_fill_(~finite.unsqueeze(-1), 0.0)
    return quotient.clamp_(-FP8_MAX, FP8_MAX).to(FP8), scale


_WIDE = torch.arange(256, dtype=torch.uint8).view(FP8).float()
