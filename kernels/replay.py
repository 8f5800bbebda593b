"""Advances a Mamba layer's state over logged tokens, in place: conv and recurrence.

The log holds a layer's raw projections (xBC before the conv, dt before softplus). Both towers
move their states with this operator and with nothing else, so the two sides stay bit-equal, and
n tokens then m give the same bits as n + m at once: every step is pointwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.kernels.causal_conv1d import advance_history, causal_conv1d
from twotower.kernels.elementwise import softplus
from twotower.kernels.rows import Rows

# What the replay of a GPU may take for conv and steps; more layers than fit follow one another.
SCRATCH_BYTES = 128 << 20


@dataclass(frozen=True)
class ReplayWeights:
    """What replaying M Mamba layers needs: conv_weight [M, Cd, K], conv_bias [M, Cd] or None,
    a_log and dt_bias [M, H]; `groups` is the number of groups that share B and C."""

    conv_weight: Tensor
    conv_bias: Tensor | None
    a_log: Tensor
    dt_bias: Tensor
    groups: int

    def __len__(self) -> int:
        return self.a_log.shape[0]

    def layers(self, own: slice) -> ReplayWeights:
        """Those of a run of layers."""
        return ReplayWeights(
            self.conv_weight[own],
            None if self.conv_bias is None else self.conv_bias[own],
            self.a_log[own],
            self.dt_bias[own],
            self.groups,
        )

    def tensors(self) -> dict[str, Tensor]:
        """The weights by name, for sending."""
        named = {"conv_weight": self.conv_weight, "a_log": self.a_log, "dt_bias": self.dt_bias}
        return named if self.conv_bias is None else {**named, "conv_bias": self.conv_bias}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], groups: int) -> ReplayWeights:
        """The opposite of `tensors`. Raises KeyError if one is missing."""
        return cls(
            # Each tap's channels next to one another, which is how the conv reads them.
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
        own = slice(start, start + count)
        for layer in range(len(weights)):
            _replay_row(
                ssm_state[slot, layer],
                conv_state[slot, layer],
                xbc[layer, own],
                dt[layer, own],
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
    """One layer of one row: ssm_state [H, P, N], history [K-1, Cd], xbc [n, Cd], dt [n, H]."""
    heads, width, n = ssm_state.shape
    bias = None if weights.conv_bias is None else weights.conv_bias[layer]
    conv = causal_conv1d(xbc.unsqueeze(0), weights.conv_weight[layer], bias, history.unsqueeze(0))[
        0
    ].float()
    advance_history(history, xbc)
    x = conv[:, : heads * width].view(-1, heads, width, 1)
    keys = conv[:, heads * width : heads * width + weights.groups * n]
    keys = keys.view(-1, weights.groups, 1, n).expand(-1, -1, heads // weights.groups, -1)
    keys = keys.reshape(-1, heads, 1, n)
    steps = softplus(dt.float() + weights.dt_bias[layer])
    decays = torch.exp(steps * -torch.exp(weights.a_log[layer]))[..., None, None]
    values = x * steps[..., None, None]
    for t in range(xbc.shape[0]):
        ssm_state.mul_(decays[t]).addcmul_(values[t], keys[t])
