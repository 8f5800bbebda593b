"""Short causal depthwise convolution that starts from a history.

    out[t, c] = silu(bias[c] + sum_j weight[c, j] * input[t - (K - 1) + j, c])

where inputs before the first token come from `history`, the last K-1 raw inputs, oldest first.
Source: Gu and Dao 2023 (Mamba), section 3.4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from twotower.kernels.elementwise import silu_


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor) -> Tensor:
    """x [B, L, ..., C], weight [..., C, K], bias [..., C] or None, history [B, K-1, ..., C] -> silu
    of the convolution, [B, L, ..., C] in x's dtype. Sums run in fp32 in the order of the taps."""
    return convolve(torch.cat((history.to(x.dtype), x), dim=1), weight, bias)


def convolve(padded: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`causal_conv1d` of inputs that stand behind their history, [B, K-1 + L, ..., C]."""
    wide, taps = padded.float(), weight.shape[-1]
    length = padded.shape[1] - taps + 1
    columns = weight.float().unbind(-1)
    out = wide[:, :length] * columns[0]
    for tap in range(1, taps):
        out.addcmul_(wide[:, tap : tap + length], columns[tap])
    if bias is not None:
        out.add_(bias.float())
    return silu_(out).to(padded.dtype)


def tap_major(weight: Tensor) -> Tensor:
    """The same weight [C, K], laid out in memory with each tap's channels as neighbours, as
    `causal_conv1d` reads it."""
    return weight.t().contiguous().t()
