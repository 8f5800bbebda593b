# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""`twotower.kernels.replay` as Triton kernels: all layers of all rows in two launches.

    h_t = exp(step_t A) h_{t-1} + step_t x_t B_t^T

The first launch writes conv and steps to memory. In the second a program holds a slice of a head's
state in registers over the row's tokens, and shifts a share of the conv history.
Every step is pointwise, with the same operations in the same order for every token: the bits of
a state depend on its row's tokens alone, and n tokens then m give those of n + m at once. The
scratch is M T (Di + G N) elements of the log's dtype, of as many layers at a time as SCRATCH_BYTES
hold. Source: Dao and Gu 2024 (Mamba-2), section 7.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from twotower.kernels.launch_table import tuned
from twotower.kernels.mamba_triton import prepare
from twotower.kernels.overlap_triton import overlap, wait
from twotower.kernels.replay import SCRATCH_BYTES, ReplayWeights
from twotower.kernels.rows import Rows


@dataclass(frozen=True)
class Slice:
    """Channels of a head's state that a program holds, and its warps."""

    channels: int
    num_warps: int


SLICE = Slice(channels=16, num_warps=1)


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
    head_dim: tl.constexpr,
    state_dim: tl.constexpr,
    kept: tl.constexpr,
    block_p: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    block_c: tl.constexpr,
    waits: tl.constexpr,
):
    """A program per (head and slice of P, row, layer): advances its slice of the state, and its
    share of the channels of the conv history."""
    wait(waits)
    slices: tl.constexpr = (head_dim + block_p - 1) // block_p
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
    inside = (p < head_dim)[:, None] & (column < state_dim)[None, :]
    state_at = ssm_state + slot * ssm_state_stride_s + layer * ssm_state_stride_m
    state_at += head * ssm_state_stride_h + p[:, None] * ssm_state_stride_p + column[None, :]
    state = tl.load(state_at, mask=inside, other=0.0)
    rate = -tl.exp(tl.load(a_log + layer * a_log_stride_m + head).to(tl.float32))
    token = layer * total_tokens + start
    step_at = steps + token * heads + head
    x_at = conv + token * conv_channels + head * head_dim + p
    key_channel = heads * head_dim + head // per_group * state_dim + column
    key_at = conv + token * conv_channels + key_channel
    for _ in range(0, count):
        step = tl.load(step_at)
        x = tl.load(x_at, mask=p < head_dim, other=0.0).to(tl.float32)
        key = tl.load(key_at, mask=column < state_dim, other=0.0).to(tl.float32)
        # An explicit fma: a compiler may fuse the operations of some tokens and not of others.
        state = tl.fma(state, tl.exp(step * rate), (x * step)[:, None] * key[None, :])
        step_at += heads
        x_at += conv_channels
        key_at += conv_channels
    tl.store(state_at, state, mask=inside)

    if kept > 0:
        tap = tl.arange(0, block_k)
        share = tl.arange(0, block_c)
        channel = tl.program_id(0) * moved_channels + share
        live = (share < moved_channels) & (channel < all_channels)
        live = (tap < kept)[:, None] & live[None, :]
        history = conv_state + slot * conv_state_stride_s + layer * conv_state_stride_m
        at = (count - kept + tap)[:, None]
        fresh = xbc + layer * xbc_stride_m + start * xbc_stride_t
        new = tl.load(fresh + at * xbc_stride_t + channel[None, :], mask=live & (at >= 0))
        older = history + (at + kept) * conv_state_stride_k + channel[None, :]
        old = tl.load(older, mask=live & (at < 0))
        new = tl.where(at >= 0, new.to(old.dtype), old)
        # A thread's store may overwrite an element that another thread still has to load.
        tl.debug_barrier()
        written = history + tap[:, None] * conv_state_stride_k + channel[None, :]
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
    heads, head_dim, state_dim = ssm_state.shape[2:]
    assert ssm_state.stride(4) == 1
    assert conv_state.shape[3] == all_channels
    if not rows.count or not rows.max_seqlen or not layers:
        return
    channels = heads * head_dim + weights.groups * state_dim
    layer_bytes = tokens * (channels * xbc.element_size() + heads * 4)
    at_once = max(1, SCRATCH_BYTES // layer_bytes)
    for first in range(0, layers, at_once):
        part = slice(first, first + at_once)
        _replay_layers(
            ssm_state[:, part],
            conv_state[:, part],
            xbc[part],
            dt[part],
            weights if at_once >= layers else weights.layers(part),
            rows,
            counts,
        )


def _replay_layers(
    ssm_state: Tensor,
    conv_state: Tensor,
    xbc: Tensor,
    dt: Tensor,
    weights: ReplayWeights,
    rows: Rows,
    counts: Tensor,
) -> None:
    """Replays as many layers as fit into the scratch, in two launches."""
    layers, tokens, all_channels = xbc.shape
    heads, head_dim, state_dim = ssm_state.shape[2:]
    kept = conv_state.shape[2]
    channels = heads * head_dim + weights.groups * state_dim
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
    kind = "token" if rows.max_seqlen == 1 else "block"
    shape = tuned(f"replay_{kind}", rows.count, SLICE, xbc.device)
    block_p = min(shape.channels, triton.next_power_of_2(head_dim))
    parts = heads * triton.cdiv(head_dim, block_p)
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
        head_dim=head_dim,
        state_dim=state_dim,
        kept=kept,
        block_p=block_p,
        block_n=triton.next_power_of_2(state_dim),
        block_k=max(1, triton.next_power_of_2(kept)),
        block_c=triton.next_power_of_2(moved),
        num_warps=shape.num_warps,
        **overlap(xbc.device),
    )
