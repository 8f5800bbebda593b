"""Advances a Mamba layer's state over logged tokens, in place: conv and recurrence.

    xBC = silu(conv(xBC));  dt = softplus(dt + dt_bias)
    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        h [P, N], A = -exp(A_log)

The log holds a layer's raw projections (xBC before the conv, dt before softplus). Both towers
advance their states with this operator and with nothing else, so the two sides stay bit-equal, and
n tokens then m give the same bits as n + m at once: every step is pointwise.
Source: Gu and Dao 2023 (Mamba), section 3.4; Dao and Gu 2024 (Mamba-2), section 7.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.kernels.causal_conv1d import convolve
from twotower.kernels.elementwise import softplus
from twotower.kernels.rows import Rows

# Limit on the GPU kernel's buffers for conv and steps; more layers than fit run one after another.
SCRATCH_BYTES = 128 << 20
# Limits of what one operation takes on a CPU, so that it stays in a core's cache until the next:
# elements of a conv's output, and of a state.
_CONV_ELEMENTS = 1 << 17
_STATE_ELEMENTS = 1 << 16


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
    channels, layers = xbc.shape[-1], len(weights)
    for starts, slots, count in _batches(rows, counts.tolist(), _CONV_ELEMENTS // channels):
        step = max(1, _CONV_ELEMENTS // (len(slots) * count * channels))
        for layer in range(0, layers, step):
            own = slice(layer, layer + step)
            _replay_batch(
                ssm_state[:, own],
                conv_state[:, own],
                _of_rows(xbc[own], starts, count),
                _of_rows(dt[own], starts, count),
                weights.layers(own),
                slots,
            )


def _batches(
    rows: Rows, counts: Sequence[int], most_tokens: int
) -> Iterator[tuple[list[int], list[int], int]]:
    """First tokens and slots of rows that move over the same number of tokens, and that number;
    together at most `most_tokens` tokens, or one row."""
    for count in sorted(set(counts) - {0}):
        moved = [
            (start, slot)
            for start, slot, own in zip(rows.host.cu_seqlens, rows.host.slots, counts, strict=False)
            if own == count and slot >= 0
        ]
        step = max(1, most_tokens // count)
        for first in range(0, len(moved), step):
            part = moved[first : first + step]
            yield [start for start, _ in part], [slot for _, slot in part], count


def _of_rows(log: Tensor, starts: Sequence[int], count: int) -> Tensor:
    """`count` tokens of a log [M, T, C] from each of B starts on -> [B, count, M, C]; a view where
    they lie side by side."""
    first, total = starts[0], len(starts) * count
    if list(starts) == list(range(first, first + total, count)):
        part = log[:, first : first + total]
    else:
        tokens = [token for start in starts for token in range(start, start + count)]
        part = log.index_select(1, torch.tensor(tokens, device=log.device))
    layers, _, width = part.shape
    return part.view(layers, len(starts), count, width).permute(1, 2, 0, 3)


def _replay_batch(
    ssm_state: Tensor,
    conv_state: Tensor,
    xbc: Tensor,
    dt: Tensor,
    weights: ReplayWeights,
    slots: Sequence[int],
) -> None:
    """Advances the layers of B rows by n tokens each: ssm_state [S, M, H, P, N] and conv_state
    [S, M, K-1, Cd] of `slots` in place, xbc [B, n, M, Cd], dt [B, n, M, H]."""
    layers, heads, head_dim, state_dim = ssm_state.shape[1:]
    conv = _advance_conv(conv_state, xbc, weights, slots)
    shared = weights.groups * state_dim
    x, keys, _ = conv.split_with_sizes((heads * head_dim, shared, shared), dim=-1)
    steps = softplus(dt.float() + weights.dt_bias)
    decays = torch.exp(steps * -torch.exp(weights.a_log))[..., None, None]
    values = (x.unflatten(-1, (heads, head_dim)) * steps[..., None])[..., None]
    keys = keys.unflatten(-1, (weights.groups, 1, 1, state_dim))
    keys = keys.expand(-1, -1, -1, -1, heads // weights.groups, -1, -1).flatten(3, 4)
    layers_at_once = max(1, _STATE_ELEMENTS // (heads * head_dim * state_dim))
    for row, slot in enumerate(slots):
        for layer in range(0, layers, layers_at_once):
            own = slice(layer, layer + layers_at_once)
            state = ssm_state[slot, own]
            parts = (part[row, :, own].unbind() for part in (decays, values, keys))
            for decay, value, key in zip(*parts, strict=True):
                state.mul_(decay).addcmul_(value, key)


def _advance_conv(
    conv_state: Tensor, xbc: Tensor, weights: ReplayWeights, slots: Sequence[int]
) -> Tensor:
    """The conv of xbc [B, n, M, Cd] behind the histories of `slots`, fp32, which it moves on."""
    at = torch.tensor(slots, device=conv_state.device)
    history = conv_state.index_select(0, at).transpose(1, 2)
    kept = history.shape[1]
    padded = torch.cat((history.to(xbc.dtype), xbc), dim=1)
    if kept:
        conv_state.index_copy_(0, at, padded[:, -kept:].transpose(1, 2).to(conv_state.dtype))
    return convolve(padded, weights.conv_weight, weights.conv_bias).float()
