"""Advances a Mamba layer's state over logged tokens, in place: conv and recurrence.

    xBC = silu(conv(xBC));  dt = softplus(dt + dt_bias)
    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        h [P, N], A = -exp(A_log)

The log holds a layer's raw projections (xBC before the conv, dt before softplus). Both towers
advance their states with this operator and with nothing else, so the two sides stay bit-equal, and
n tokens then m give the same bits as n + m at once: every step is pointwise.
Source: Gu and Dao 2023 (Mamba), section 3.4; Dao and Gu 2024 (Mamba-2), section 7.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.kernels.causal_conv1d import advance_history, causal_conv1d
from twotower.kernels.elementwise import softplus
from twotower.kernels.rows import Rows

# Limit on the GPU kernel's buffers for conv and steps; more layers than fit run one after another.
SCRATCH_BYTES = 128 << 20


@dataclass(frozen=True)
class ReplayWeights:
    """Weights of M Mamba layers that `replay` reads: conv_weight [M, Cd, K], conv_bias [M, Cd] or
    None, a_log and dt_bias [M, H]. Heads of a group share B and C; there are `groups` groups."""

    conv_weight: Tensor
    conv_bias: Tensor | None
    a_log: Tensor
    dt_bias: Tensor
    groups: int

    def __len__(self) -> int:
        return self.a_log.shape[0]

    def layers(self, part: slice) -> ReplayWeights:
        """The weights of the layers in `part`, as views."""
        return ReplayWeights(
            self.conv_weight[part],
            None if self.conv_bias is None else self.conv_bias[part],
            self.a_log[part],
            self.dt_bias[part],
            self.groups,
        )

    def tensors(self) -> dict[str, Tensor]:
        """The weights by name, for sending."""
        named = {"conv_weight": self.conv_weight, "a_log": self.a_log, "dt_bias": self.dt_bias}
        return named if self.conv_bias is None else {**named, "conv_bias": self.conv_bias}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], groups: int) -> ReplayWeights:
        """The inverse of `tensors`. Raises KeyError for a missing name other than conv_bias."""
        return cls(
            # In memory each tap's channels are neighbours, as the conv reads them.
            tensors["conv_weight"].transpose(1, 2).contiguous().transpose(1, 2),
            tensors.get("conv_bias"),
            tensors["a_log"],
            tensors["dt_bias"],
            groups,
        )


def replay(
    ssm_state: Tensor,
    conv_state: Tensor,
    xbc: Tensor,
    dt: Tensor,
    weights: ReplayWeights,
    rows: Rows,
    counts: Tensor,
) -> None:
    """Advances ssm_state [S, M, H, P, N] fp32 and conv_state [S, M, K-1, Cd]: each row's slot over
    the first counts[row] (int32 [B]) of the row's tokens in xbc [M, T, Cd] and dt [M, T, H]."""
    for row, count in enumerate(counts.tolist()):
        slot, start = rows.host.slots[row], rows.host.cu_seqlens[row]
        if slot < 0 or not count:
            continue
        tokens = slice(start, start + count)
        for layer in range(len(weights)):
            _replay_row(
                ssm_state[slot, layer],
                conv_state[slot, layer],
                xbc[layer, tokens],
                dt[layer, tokens],
                weights,
                layer,
            )


def _replay_row(
    ssm_state: Tensor,
    history: Tensor,
    xbc: Tensor,
    dt: Tensor,
    weights: ReplayWeights,
    layer: int,
) -> None:
    """Advances one layer of one row by n tokens: ssm_state [H, P, N] and history [K-1, Cd] in
    place, xbc [n, Cd], dt [n, H]."""
    heads, head_dim, state_dim = ssm_state.shape
    bias = None if weights.conv_bias is None else weights.conv_bias[layer]
    conv = causal_conv1d(xbc.unsqueeze(0), weights.conv_weight[layer], bias, history.unsqueeze(0))[
        0
    ].float()
    advance_history(history, xbc)
    x = conv[:, : heads * head_dim].view(-1, heads, head_dim, 1)
    keys = conv[:, heads * head_dim : heads * head_dim + weights.groups * state_dim]
    keys = keys.view(-1, weights.groups, 1, state_dim).expand(-1, -1, heads // weights.groups, -1)
    keys = keys.reshape(-1, heads, 1, state_dim)
    steps = softplus(dt.float() + weights.dt_bias[layer])
    decays = torch.exp(steps * -torch.exp(weights.a_log[layer]))[..., None, None]
    values = x * steps[..., None, None]
    for t in range(xbc.shape[0]):
        ssm_state.mul_(decays[t]).addcmul_(values[t], keys[t])
