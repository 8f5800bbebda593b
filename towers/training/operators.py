"""The memory-bound parts of a layer as pure functions of tensors, plain or compiled.

On a CPU with fast matrix units most of a step's time is spent between the products; compiling these
functions (with a C++ compiler) makes the whole step about a third faster.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.towers.training.scan import causal_conv, chunk_scan


class MambaWeights(NamedTuple):
    """Weights of a Mamba mixer other than its projections.

    `conv` [Cd, K], `conv_bias` [Cd] or None, `norm` [Di]; `dt_bias`, `decay_log` (A_log) and `skip`
    (D) [heads].
    """

    conv: Tensor
    conv_bias: Tensor | None
    dt_bias: Tensor
    decay_log: Tensor
    skip: Tensor
    norm: Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis, in fp32, returned in the dtype of `x`."""
    wide = x.float()
    scale = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(x.dtype)


def mamba_inner(
    z: Tensor,
    padded: Tensor,
    dt: Tensor,
    weights: MambaWeights,
    borders: Tensor | None,
    chunked: tuple[int, int],
    sizes: tuple[int, int, int],
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Convolution, scan and gated norm of R rows in n chunks; `chunked` is (R, n).

    `z` [.., Di], `padded` [.., K-1+T, Cd], raw `dt` [.., heads]; `sizes` is (heads, groups, N).
    Returns y [R, n, L, Di] and the border states, see `chunk_scan`.
    Source: Dao and Gu 2024 (Mamba-2), section 7.
    """
    heads, groups, width = sizes
    dt = F.softplus(dt.float() + weights.dt_bias.float()).reshape(*chunked, -1, heads)
    mixed = causal_conv(padded, weights.conv)
    mixed = F.silu(mixed if weights.conv_bias is None else mixed + weights.conv_bias)
    inner = z.shape[-1]
    parts = [inner, groups * width, groups * width]
    x, b, c = torch.split(mixed.view(*dt.shape[:3], -1), parts, dim=-1)
    y, borders = chunk_scan(
        torch.unflatten(x, -1, (heads, -1)),
        torch.unflatten(b, -1, (groups, width)),
        torch.unflatten(c, -1, (groups, width)),
        dt,
        -weights.decay_log.float().exp(),
        weights.skip.float(),
        borders,
    )
    gated = y.flatten(-2) * F.silu(z.reshape(*dt.shape[:3], inner))
    grouped = torch.unflatten(gated, -1, (groups, -1))
    return rms_norm(grouped, weights.norm.view(groups, -1), eps).flatten(-2), borders


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[R, T, heads * hd] from q [R, T, kv, group, hd] and k, v [R, T, kv, hd]."""
    rows, length, kv, group, size = q.shape
    q = (q * size**-0.5).permute(0, 2, 3, 1, 4).reshape(rows, kv, group * length, size)
    scores = (q @ k.permute(0, 2, 3, 1)).view(rows, kv, group, length, length)
    future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    share = scores.masked_fill(future, -torch.inf).softmax(-1, dtype=torch.float32).to(v.dtype)
    out = share.view(rows, kv, group * length, length) @ v.transpose(1, 2)
    return out.view(rows, kv, group, length, size).permute(0, 3, 1, 2, 4).flatten(2)


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, far_k: Tensor, far_v: Tensor, starts: Tensor
) -> Tensor:
    """Each block attends to the context before it and, in both directions, to itself.

    q [R, m, L, kv, group, hd], k, v [R, m, L, kv, hd]; context `far_k`, `far_v` [R, T, kv, hd], of
    which block j attends to the first `starts[j]` tokens. Returns [R, m, L, heads * hd].
    """
    rows, blocks, length, kv, group, size = q.shape
    context = far_k.shape[1]
    # [R, kv, m, group * L, hd] serves both products.
    q = (q * size**-0.5).permute(0, 3, 1, 4, 2, 5).reshape(rows, kv, blocks, group * length, size)
    k, v = k.permute(0, 3, 1, 2, 4), v.permute(0, 3, 1, 2, 4)
    far = (q.flatten(2, 3) @ far_k.permute(0, 2, 3, 1)).view(*q.shape[:4], context)
    hidden = torch.arange(context, device=q.device) >= starts[:, None]
    far = far.masked_fill(hidden[:, None, :], -torch.inf)
    share = torch.cat([far, q @ k.mT], dim=-1).softmax(-1, dtype=torch.float32).to(v.dtype)
    far_share, near_share = torch.split(share, [context, length], dim=-1)
    out = (far_share.flatten(2, 3) @ far_v.transpose(1, 2)).view(q.shape) + near_share @ v
    return out.view(rows, kv, blocks, group, length, size).permute(0, 2, 4, 1, 3, 5).flatten(3)


def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean negative log-likelihood in nats, fp32, of `targets` [N] under `logits` [N, V], weighted
    by `weights` [N] if there are any."""
    if weights is None:
        return F.cross_entropy(logits.float(), targets)
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    return (losses * weights).sum() / weights.sum()


@dataclass(frozen=True)
class Operators:
    """The functions of this file, as they are or compiled."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm
    mamba_inner: Callable[..., tuple[Tensor, Tensor]] = mamba_inner
    causal_attention: Callable[[Tensor, Tensor, Tensor], Tensor] = causal_attention
    block_attention: Callable[..., Tensor] = block_attention
    cross_entropy: Callable[..., Tensor] = cross_entropy


PLAIN = Operators()


def compiled_operators() -> Operators:
    """Operators compiled for the shapes of their calls; the first steps take a minute more."""
    return Operators(
        torch.compile(rms_norm, dynamic=False),
        torch.compile(mamba_inner, dynamic=False),
        torch.compile(causal_attention, dynamic=False),
        torch.compile(block_attention, dynamic=False),
        # The number of masked positions changes from step to step.
        torch.compile(cross_entropy, dynamic=None),
    )
