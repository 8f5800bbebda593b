"""Experts stored in 8 bits: float8 e4m3 values with one scale per output channel.

    weight[e, n, k] = values[e, n, k] * scale[e, n]

Arithmetic stays in the input's dtype: values are widened after the load and the scale multiplies
the finished sum, so a product differs from that of the stored weights by rounding alone.
Source: Micikevicius et al. 2022, "FP8 formats for deep learning", section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


@dataclass(frozen=True)
class QuantizedExperts:
    """A matrix [N, K] per expert: `values` [E, N, K] float8 e4m3, `scale` [E, N] fp32."""

    values: Tensor
    scale: Tensor

    def __len__(self) -> int:
        return self.values.shape[0]

    def __getitem__(self, expert: int) -> Tensor:
        """One expert's matrix [N, K], fp32."""
        return self.values[expert].float() * self.scale[expert].unsqueeze(1)


def quantize(weight: Tensor) -> QuantizedExperts:
    """weight [E, N, K] -> the nearest 8-bit values; a channel's largest becomes +-FP8_MAX.

    A channel of zeros or subnormal numbers gets scale 1. Raises ValueError for values that are not
    finite.
    """
    wide = weight.float()
    largest = wide.abs().amax(-1)
    if not bool(torch.isfinite(largest).all()):
        raise ValueError("weight: got values that are not finite, expected finite ones")
    usable = largest > FP8_MAX * torch.finfo(torch.float32).tiny
    scale = torch.where(usable, largest / FP8_MAX, torch.ones_like(largest))
    values = (wide / scale.unsqueeze(-1)).clamp_(-FP8_MAX, FP8_MAX).to(FP8)
    return QuantizedExperts(values, scale)
