"""Short causal depthwise convolution that starts from a history.

    out[t, c] = silu(bias[c] + sum_j weight[c, j] * input[t - (K - 1) + j, c])

where inputs before the first token come from `history`, the last K-1 raw inputs, oldest first.
Source: Gu and Dao 2023 (Mamba), section 3.4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from twotower.kernels.elementwise import silu


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor) -> Tensor:
    """x [B, L, C], weight [C, K], bias [C] or None, history [B, K-1, C] -> silu of the convolution,
    [B, L, C] in x's dtype. Sums run in fp32 in the order of the taps."""
    length, taps = x.shape[1], weight.shape[1]
    padded = torch.cat((history.to(x.dtype), x), dim=1).float()
    columns = weight.float().unbind(1)
    out = padded[:, :length] * columns[0]
    for tap in range(1, taps):
        out = out + padded[:, tap : tap + length] * columns[tap]
    if bias is not None:
        out = out + bias.float()
    return silu(out).to(x.dtype)


def tap_major(weight: Tensor) -> Tensor:
    """The same weight [C, K], laid out in memory with each tap's channels as neighbours, as
    `causal_conv1d` reads it."""
    return weight.t().contiguous().t()


def advance_history(history: Tensor, x: Tensor) -> None:
    """Appends inputs x [n, C] to history [K-1, C] in place and drops the oldest."""
    kept = history.shape[0]
    if kept:
        history.copy_(torch.cat((history, x.to(history.dtype)))[-kept:])
