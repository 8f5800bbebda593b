"""Advances a Mamba layer's state over logged tokens, in place: conv and recurrence.

The log holds a layer's raw projections (xBC before the conv, dt before softplus). Both towers
move their states with this operator and with nothing else, so the two sides stay bit-equal, and
n tokens then m give the same bits as n + m at once: every step is pointwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.kernels.causal_conv1d import advance_history, causal_conv1d, tap_major
from twotower.kernels.elementwise import softplus


@dataclass(frozen=True)
class ReplayWeights:
    """What replaying one Mamba layer needs: conv_weight [Cd, K], conv_bias [Cd] or None,
    a_log and dt_bias [H]; `groups` is the number of groups that share B and C."""

    conv_weight: Tensor
    conv_bias: Tensor | None
    a_log: Tensor
    dt_bias: Tensor
    groups: int


def stack_weights(weights: Sequence[ReplayWeights]) -> dict[str, Tensor]:
    """The weights of M layers as tensors with a leading dimension M, for sending."""
    stacked = {
        "conv_weight": torch.stack([own.conv_weight for own in weights]),
        "a_log": torch.stack([own.a_log for own in weights]),
        "dt_bias": torch.stack([own.dt_bias for own in weights]),
    }
    biases = [own.conv_bias for own in weights if own.conv_bias is not None]
    return {**stacked, "conv_bias": torch.stack(biases)} if biases else stacked


def unstack_weights(stacked: Mapping[str, Tensor], groups: int) -> list[ReplayWeights]:
    """The opposite of `stack_weights`. Raises KeyError if one is missing."""
    conv_weight, biases = stacked["conv_weight"], stacked.get("conv_bias")
    return [
        ReplayWeights(
            tap_major(conv_weight[layer]),
            None if biases is None else biases[layer],
            stacked["a_log"][layer],
            stacked["dt_bias"][layer],
            groups,
        )
        for layer in range(conv_weight.shape[0])
    ]


def replay(
    ssm_state: Tensor, history: Tensor, xbc: Tensor, dt: Tensor, weights: ReplayWeights
) -> None:
    """Advances ssm_state [H, P, N] fp32 and history [K-1, Cd] over xbc [n, Cd], dt [n, H]."""
    heads, width, n = ssm_state.shape
    conv = causal_conv1d(
        xbc.unsqueeze(0), weights.conv_weight, weights.conv_bias, history.unsqueeze(0)
    )[0].float()
    advance_history(history, xbc)
    x = conv[:, : heads * width].view(-1, heads, width, 1)
    keys = conv[:, heads * width : heads * width + weights.groups * n]
    keys = keys.view(-1, weights.groups, 1, n).expand(-1, -1, heads // weights.groups, -1)
    keys = keys.reshape(-1, heads, 1, n)
    steps = softplus(dt.float() + weights.dt_bias)
    decays = torch.exp(steps * -torch.exp(weights.a_log))[..., None, None]
    values = x * steps[..., None, None]
    for t in range(xbc.shape[0]):
        ssm_state.mul_(decays[t]).addcmul_(values[t], keys[t])
