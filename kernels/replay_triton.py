# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""`twotower.kernels.replay` as Triton kernels: all layers of all rows in two launches.

    h_t = exp(step_t A) h_{t-1} + step_t x_t B_t^T

The first launch leaves conv and steps in memory. In the second a program owns a slice of one
head's state, holds it in registers over the row's tokens, and moves a share of the conv history.
Every step is pointwise, with the same operations in the same order for every token: the bits of
a state depend on its row's tokens alone, and n tokens then m give those of n + m at once. The
scratch is M T (Di + G N) elements of the log's dtype, of as many layers at a time as SCRATCH_BYTES
hold. Source: Dao and Gu 2024 (Mamba-2).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from twotower.kernels.mamba_triton import prepare
from twotower.kernels.replay import SCRATCH_BYTES, ReplayWeights
from twotower.kernels.rows import Rows

# Channels of a head's state that one program holds, and its warps.
SLICE = 16
WARPS = 1


@triton.jit
def _replay_kernel(
    ssm_state,
    ssm_state_stride_s,
    ssm_state_stride_m,
    ssm_state_stride_h,
    ssm_state_stride_p,
    conv_state,
    conv_state_stride_s,
    conv_state_stride_m,
    conv_state_stride_k,
    xbc,
    xbc_stride_m,
    xbc_stride_t,
    conv,
    steps,
    a_log,
    a_log_stride_m,
    cu_seqlens,
    slots,
    counts,
    total_tokens,
    heads,
    per_group,
    conv_channels,
    all_channels,
    moved_channels,
    width: tl.constexpr,
    n: tl.constexpr,
    kept: tl.constexpr,
    block_p: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    block_c: tl.constexpr,
):
    """Program (head and slice of P, row, layer)."""
    slices: tl.constexpr = (width + block_p - 1) // block_p
    head = tl.program_id(0) // slices
    row = tl.program_id(1)
    layer = tl.program_id(2).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    count = tl.load(counts + row)
    if slot < 0 or count <= 0:
        return
    start = tl.load(cu_seqlens + row).to(tl.int64)

    p = tl.program_id(0) % slices * block_p + tl.arange(0, block_p)
    column = tl.arange(0, block_n)
    inside = (p < width)[:, None] & (column < n)[None, :]
    own = ssm_state + slot * ssm_state_stride_s + layer * ssm_state_stride_m
    own += head * ssm_state_stride_h + p[:, None] * ssm_state_stride_p + column[None, :]
    held = tl.load(own, mask=inside, other=0.0)
    rate = -tl.exp(tl.load(a_log + layer * a_log_stride_m + head).to(tl.float32))
    token = layer * total_tokens + start
    step_at = steps + token * heads + head
    x_at = conv + token * conv_channels + head * width + p
    key_at = conv + token * conv_channels + heads * width + head // per_group * n + column
    for _ in range(0, count):
        step = tl.load(step_at)
        x = tl.load(x_at, mask=p < width, other=0.0).to(tl.float32)
        key = tl.load(key_at, mask=column < n, other=0.0).to(tl.float32)
        # Said as one fused operation, so that no compiler fuses one token's otherwise.
        held = tl.fma(held, tl.exp(step * rate), (x * step)[:, None] * key[None, :])
        step_at += heads
        x_at += conv_channels
        key_at += conv_channels
    tl.store(own, held, mask=inside)

    if kept > 0:
        place = tl.arange(0, block_k)
        share = tl.arange(0, block_c)
        channel = tl.program_id(0) * moved_channels + share
        live = (share < moved_channels) & (channel < all_channels)
        live = (place < kept)[:, None] & live[None, :]
        history = conv_state + slot * conv_state_stride_s + layer * conv_state_stride_m
        at = (count - kept + place)[:, None]
        fresh = xbc + layer * xbc_stride_m + start * xbc_stride_t
        new = tl.load(fresh + at * xbc_stride_t + channel[None, :], mask=live & (at >= 0))
        older = history + (at + kept) * conv_state_stride_k + channel[None, :]
        old = tl.load(older, mask=live & (at < 0))
        new = tl.where(at >= 0, new.to(old.dtype), old)
        # A thread's store may hit what another still has to load.
        tl.debug_barrier()
        written = history + place[:, None] * conv_state_stride_k + channel[None, :]
        tl.store(written, new, mask=live)


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
    layers, tokens, all_channels = xbc.shape
    heads, width, n = ssm_state.shape[2:]
    assert ssm_state.stride(4) == 1
    assert conv_state.shape[3] == all_channels
    if not rows.count or not rows.max_seqlen or not layers:
        return
    channels = heads * width + weights.groups * n
    layer_bytes = tokens * (channels * xbc.element_size() + heads * 4)
    at_once = max(1, SCRATCH_BYTES // layer_bytes)
    for first in range(0, layers, at_once):
        own = slice(first, first + at_once)
        part = weights if at_once >= layers else weights.layers(own)
        _replay_layers(ssm_state[:, own], conv_state[:, own], xbc[own], dt[own], part, rows, counts)


def _replay_layers(
    ssm_state: Tensor,
    conv_state: Tensor,
    xbc: Tensor,
    dt: Tensor,
    weights: ReplayWeights,
    rows: Rows,
    counts: Tensor,
) -> None:
    """Two launches for as many layers as the scratch holds."""
    layers, tokens, all_channels = xbc.shape
    heads, width, n = ssm_state.shape[2:]
    kept = conv_state.shape[2]
    channels = heads * width + weights.groups * n
    conv, steps = prepare(
        xbc,
        dt,
        conv_state,
        weights.conv_weight,
        weights.conv_bias,
        weights.dt_bias,
        rows,
        channels,
        counts,
    )
    block_p = min(SLICE, triton.next_power_of_2(width))
    parts = heads * triton.cdiv(width, block_p)
    moved = triton.cdiv(all_channels, parts)
    _replay_kernel[(parts, rows.count, layers)](
        ssm_state,
        *ssm_state.stride()[:4],
        conv_state,
        *conv_state.stride()[:3],
        xbc,
        *xbc.stride()[:2],
        conv,
        steps,
        weights.a_log,
        weights.a_log.stride(0),
        rows.cu_seqlens,
        rows.slots,
        counts,
        tokens,
        heads,
        heads // weights.groups,
        channels,
        all_channels,
        moved,
        width=width,
        n=n,
        kept=kept,
        block_p=block_p,
        block_n=triton.next_power_of_2(n),
        block_k=max(1, triton.next_power_of_2(kept)),
        block_c=triton.next_power_of_2(moved),
        num_warps=WARPS,
    )
