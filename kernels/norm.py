"""RMS norms: plain, modulated by a timestep (adaLN), and gated in groups.

    rms(x) = x / sqrt(mean(x^2) + eps) * weight

All are computed in fp32 over the last dimension and returned in x's dtype.
Sources: RMSNorm, Zhang and Sennrich 2019; adaLN, Peebles and Xie 2023 (DiT), section 3.2;
gated group norm, Dao and Gu 2024 (Mamba-2), section 7.
"""

from __future__ import annotations

import torch
from torch import Tensor

from twotower.kernels.elementwise import silu


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., H], weight [H] -> [..., H]."""
    return (_unit_rms(x.float(), eps) * weight.float()).to(x.dtype)


def adaln(
    x: Tensor, weight: Tensor, eps: float, shift: Tensor, scale: Tensor, modulate_first: bool
) -> Tensor:
    """x [T, H], shift and scale [T, H] or [1, H] -> the input of a denoiser's mixer, [T, H].

    Mamba and attention layers modulate and then norm; MoE and MLP layers norm and then modulate.
    """
    if modulate_first:
        return rms_norm(x * (1.0 + scale) + shift, weight, eps)
    return rms_norm(x, weight, eps) * (1.0 + scale) + shift


def gated_group_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """y [T, D] fp32, gate z [T, D], weight [D] -> [T, D] in z's dtype.

    The gate comes first: u = y * silu(z), then u is normed within each of `groups` groups.
    """
    u = y.float() * silu(z.float())
    grouped = _unit_rms(u.unflatten(-1, (groups, -1)), eps)
    return (grouped.flatten(-2) * weight.float()).to(z.dtype)


def _unit_rms(x: Tensor, eps: float) -> Tensor:
    # A division by sqrt: rsqrt rounds differently at the tail of a tensor.
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)
