"""RMS norms: plain, modulated by a timestep (adaLN), and gated in groups.

    rms(x) = x / sqrt(mean(x^2) + eps) * weight

All are computed in fp32 over the last dimension. `rms_norm` returns x's dtype.
Sources: RMSNorm, Zhang and Sennrich 2019; adaLN, Peebles and Xie 2023 (DiT), section 3.2;
gated group norm, Dao and Gu 2024 (Mamba-2), section 7.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from twotower.kernels.elementwise import silu
from twotower.kernels.moe import SlotOutputs


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., H], weight [H] -> [..., H] in x's dtype, normed over the last dimension."""
    wide = x.float()
    return (wide / _rms(wide, eps)).mul_(weight.float()).to(x.dtype)


@dataclass(frozen=True)
class Modulation:
    """One layer's adaLN conditioning: `table` [n, 3, H] holds shift, scale and gate of n distinct
    timesteps, `index` [T] int64 the entry of each token."""

    table: Tensor
    index: Tensor

    def part(self, number: int) -> Tensor:
        """Shift (0), scale (1) or gate (2) of every token, [T, H]; [1, H] if the table has a single
        entry."""
        if len(self.table) == 1:
            return self.table[:, number]
        return self.table[:, number].index_select(0, self.index)


def add_norm(
    hidden: Tensor,
    delta: Tensor | SlotOutputs | None,
    gate: Modulation | None,
    weight: Tensor,
    eps: float,
    modulation: Modulation | None,
    modulate_first: bool,
) -> tuple[Tensor, Tensor]:
    """Residual sum and norm between two mixers: hidden [T, H] and the last mixer's output `delta`
    [T, H] -> the residual stream, and the next mixer's normed input, [T, H] each.

    `gate` weighs `delta`; `modulation` shifts and scales before the norm if `modulate_first`
    (Mamba and attention layers), else after it (MoE and MLP layers). Without `delta` the stream is
    `hidden` itself. Outputs of experts that are not added up yet are added up here.
    """
    if isinstance(delta, SlotOutputs):
        delta = delta.sum()
    if delta is not None:
        hidden = hidden + (delta if gate is None else gate.part(2) * delta)
    if modulation is None:
        return hidden, rms_norm(hidden, weight, eps)
    shift, scale = modulation.part(0), modulation.part(1)
    if modulate_first:
        return hidden, rms_norm(hidden * (1.0 + scale) + shift, weight, eps)
    return hidden, rms_norm(hidden, weight, eps) * (1.0 + scale) + shift


def gated_group_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """y [T, D] fp32, gate z [T, D], weight [D] -> [T, D] in z's dtype.

    The gate comes first: u = y * silu(z), then u is normed within each of `groups` groups.
    """
    u = silu(z.float()).mul_(y.float())
    grouped = u.unflatten(-1, (groups, -1))
    grouped.div_(_rms(grouped, eps))
    return u.mul_(weight.float()).to(z.dtype)


def _rms(x: Tensor, eps: float) -> Tensor:
    """The root mean square of x's last dimension, fp32 [..., 1]."""
    # A division by sqrt: rsqrt rounds differently at the tail of a tensor.
    return (x * x).mean(-1, keepdim=True).add_(eps).sqrt_()
