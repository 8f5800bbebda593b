# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""`twotower.kernels.mamba_scan` as Triton kernels.

In the chunked (SSD) form, with cum_i the sum of step_j A over the chunk's j <= i, and state h:

    y_i = sum over j <= i of (C_i B_j) exp(cum_i - cum_j) step_j x_j + exp(cum_i) h C_i + D x_i

Two launches: `prepare` for conv and steps, then a program per row and slice of a head, which
carries that slice of the state in registers from chunk to chunk. Rows of single tokens take one
launch, which computes the conv too; long rows are scanned by `chunk_scan_triton`. All products have
fp32's precision: fp32 and fp16 inputs by fp32 products, bf16 inputs by tensor cores (see
`product`).

Kernels and tiles follow from `rows.max_seqlen` alone: among passes whose longest rows have 1, 2 to
16, 17 to 64 or more tokens, a row has the same bits in any batch, unless a card's table tells
numbers of rows apart. Inside `deterministic` all take one kernel and tile.
Source: Dao and Gu 2024 (Mamba-2), section 6.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower.kernels.chunk_scan_triton import scan_side_by_side, tile_for
from twotower.kernels.determinism import is_deterministic
from twotower.kernels.exact_products_triton import operand, product
from twotower.kernels.external_scan import Scan, load_verified
from twotower.kernels.launch_table import tuned
from twotower.kernels.mamba_scan import MambaScanWeights
from twotower.kernels.mamba_triton import conv_tile, prepare, softplus
from twotower.kernels.overlap_triton import overlap, wait
from twotower.kernels.rows import Rows

# Tokens of the longest block; longer rows are pieces of a prompt.
LONGEST_BLOCK = 64


@triton.jit
def _chunks_kernel(
    conv,
    steps,
    ssm_state,
    ssm_state_stride_s,
    ssm_state_stride_h,
    ssm_state_stride_p,
    a_log,
    d,
    y,
    cu_seqlens,
    slots,
    heads,
    per_group,
    shared_channels,
    head_dim: tl.constexpr,
    state_dim: tl.constexpr,
    block_l: tl.constexpr,
    block_p: tl.constexpr,
    block_n: tl.constexpr,
    single_chunk: tl.constexpr,
    waits: tl.constexpr,
):
    """A program per (head and slice of P, row). `single_chunk`: no row is longer than a chunk."""
    wait(waits)
    slices: tl.constexpr = (head_dim + block_p - 1) // block_p
    head = tl.program_id(0) // slices
    row = tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    if slot < 0:
        return
    start = tl.load(cu_seqlens + row).to(tl.int64)
    length = (tl.load(cu_seqlens + row + 1) - start).to(tl.int32)
    inner = heads * head_dim
    channels = inner + 2 * shared_channels
    p = tl.program_id(0) % slices * block_p + tl.arange(0, block_p)
    column = tl.arange(0, block_n)
    state = tl.load(
        ssm_state
        + slot * ssm_state_stride_s
        + head * ssm_state_stride_h
        + p[:, None] * ssm_state_stride_p
        + column[None, :],
        mask=(p < head_dim)[:, None] & (column < state_dim)[None, :],
        other=0.0,
    )
    rate = -tl.exp(tl.load(a_log + head).to(tl.float32))
    skip = tl.load(d + head).to(tl.float32)
    x_at = conv + start * channels + head * head_dim + p[None, :]
    key_at = conv + start * channels + inner + head // per_group * state_dim + column[None, :]
    query_at = key_at + shared_channels
    step_at = steps + start * heads + head
    y_at = y + start * inner + head * head_dim + p[None, :]
    i = tl.arange(0, block_l)
    past = i[:, None] >= i[None, :]
    for first in range(0, block_l if single_chunk else length, block_l):
        tokens = first + i
        live = tokens < length
        offsets = tokens.to(tl.int64)[:, None]
        inside = live[:, None] & (p < head_dim)[None, :]
        shared = live[:, None] & (column < state_dim)[None, :]
        x = operand(tl.load(x_at + offsets * channels, mask=inside, other=0.0))
        keys = operand(tl.load(key_at + offsets * channels, mask=shared, other=0.0))
        queries = operand(tl.load(query_at + offsets * channels, mask=shared, other=0.0))
        step = tl.load(step_at + tokens * heads, mask=live, other=0.0)
        cum = tl.cumsum(step * rate, 0)

        # The exponent is masked, not its result: above the diagonal it could overflow.
        decay = tl.exp(tl.where(past, cum[:, None] - cum[None, :], float("-inf")))
        weights = product(queries, tl.trans(keys)) * decay * step[None, :]
        out = product(queries, tl.trans(state)) * tl.exp(cum)[:, None]
        out += product(weights, x) + skip * x.to(tl.float32)
        tl.store(y_at + offsets * inner, out, mask=inside)

        if not single_chunk:
            total = tl.sum(tl.where(i == block_l - 1, cum, 0.0), 0)
            added = x.to(tl.float32) * (step * tl.exp(total - cum))[:, None]
            state = state * tl.exp(total) + product(tl.trans(added), keys)


@triton.jit
def _token_kernel(
    projected,
    projected_stride_t,
    conv_state,
    conv_state_stride_s,
    conv_state_stride_k,
    ssm_state,
    ssm_state_stride_s,
    ssm_state_stride_h,
    ssm_state_stride_p,
    conv_weight,
    conv_weight_stride_c,
    conv_weight_stride_k,
    conv_bias,
    a_log,
    d,
    dt_bias,
    y,
    cu_seqlens,
    slots,
    heads,
    per_group,
    shared_channels,
    head_dim: tl.constexpr,
    state_dim: tl.constexpr,
    taps: tl.constexpr,
    block_p: tl.constexpr,
    block_n: tl.constexpr,
    waits: tl.constexpr,
):
    """A program per (head and slice of P, row) for rows of one token, conv included."""
    wait(waits)
    slices: tl.constexpr = (head_dim + block_p - 1) // block_p
    head = tl.program_id(0) // slices
    row = tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    start = tl.load(cu_seqlens + row).to(tl.int64)
    length = (tl.load(cu_seqlens + row + 1) - start).to(tl.int32)
    if slot < 0 or length <= 0:
        return
    inner = heads * head_dim
    p = tl.program_id(0) % slices * block_p + tl.arange(0, block_p)
    column = tl.arange(0, block_n)
    state = tl.load(
        ssm_state
        + slot * ssm_state_stride_s
        + head * ssm_state_stride_h
        + p[:, None] * ssm_state_stride_p
        + column[None, :],
        mask=(p < head_dim)[:, None] & (column < state_dim)[None, :],
        other=0.0,
    )
    row_input = projected + start * projected_stride_t + inner
    history = conv_state + slot * conv_state_stride_s
    first = tl.arange(0, 1)
    x = conv_tile(
        row_input,
        projected_stride_t,
        history,
        conv_state_stride_k,
        conv_weight,
        conv_weight_stride_c,
        conv_weight_stride_k,
        conv_bias,
        first,
        length,
        head * head_dim + p,
        p < head_dim,
        taps,
    )
    key_channels = inner + head // per_group * state_dim + column
    keys = conv_tile(
        row_input,
        projected_stride_t,
        history,
        conv_state_stride_k,
        conv_weight,
        conv_weight_stride_c,
        conv_weight_stride_k,
        conv_bias,
        first,
        length,
        key_channels,
        column < state_dim,
        taps,
    )
    queries = conv_tile(
        row_input,
        projected_stride_t,
        history,
        conv_state_stride_k,
        conv_weight,
        conv_weight_stride_c,
        conv_weight_stride_k,
        conv_bias,
        first,
        length,
        key_channels + shared_channels,
        column < state_dim,
        taps,
    )
    raw = tl.load(row_input + inner + 2 * shared_channels + head).to(tl.float32)
    step = softplus(raw + tl.load(dt_bias + head).to(tl.float32))
    decay = tl.exp(step * -tl.exp(tl.load(a_log + head).to(tl.float32)))
    score = tl.sum(keys * queries, 1)[:, None] * step + tl.load(d + head).to(tl.float32)
    out = tl.sum(state * queries, 1)[None, :] * decay + score * x
    y_at = y + start * inner + head * head_dim + p[None, :]
    tl.store(y_at + first[:, None], out, mask=(p < head_dim)[None, :])


@dataclass(frozen=True)
class Tile:
    """Tokens of a chunk and channels of a head in a program, its warps and pipeline stages.
    `single_chunk`: rows of at most a chunk, whose program does not advance the state."""

    tokens: int
    channels: int
    single_chunk: bool
    num_warps: int
    num_stages: int


TOKEN_TILE = Tile(1, 16, True, num_warps=1, num_stages=1)
# Inside `deterministic`, for rows of any number of tokens.
STEADY_TILE = Tile(16, 32, False, num_warps=4, num_stages=1)


def tile_of(max_seqlen: int) -> Tile:
    """The tile for rows of 2 to `max_seqlen` tokens; no kernel spills registers at P = 64,
    N = 128."""
    if max_seqlen <= 16:
        return Tile(16, 32, True, num_warps=4, num_stages=1)
    if max_seqlen <= LONGEST_BLOCK:
        return Tile(16, 32, False, num_warps=4, num_stages=1)
    return Tile(32, 32, False, num_warps=8, num_stages=2)


def mamba_scan(
    projected: Tensor,
    weights: MambaScanWeights,
    conv_state: Tensor,
    ssm_state: Tensor,
    rows: Rows,
) -> Tensor:
    """projected [T, Di + Cd + H] (z, xBC, dt), conv_state [S, K-1, Cd] (oldest first), ssm_state
    [S, H, P, N] fp32 -> y [T, Di] fp32, not gated yet. Di = H P, Cd = Di + 2 G N; z is not read.
    Tokens of padding or of no row are not written."""
    heads, head_dim, state_dim = ssm_state.shape[1:]
    inner = heads * head_dim
    assert projected.shape[1] == 2 * inner + 2 * weights.groups * state_dim + heads
    assert projected.stride(1) == conv_state.stride(2) == ssm_state.stride(3) == 1
    assert conv_state.dtype == projected.dtype
    y = torch.empty((projected.shape[0], inner), dtype=torch.float32, device=projected.device)
    if not rows.count or not rows.max_seqlen:
        return y
    single = rows.max_seqlen == 1 and not is_deterministic()
    scan = _scan_tokens if single else _scan_chunks
    scan(projected, weights, conv_state, ssm_state, rows, y)
    return y


def _scan_tokens(
    projected: Tensor,
    weights: MambaScanWeights,
    conv_state: Tensor,
    ssm_state: Tensor,
    rows: Rows,
    y: Tensor,
) -> None:
    """Launches the kernel for rows of one token; writes y [T, Di]."""
    heads, head_dim, state_dim = ssm_state.shape[1:]
    tile = tuned("scan_token", rows.count, TOKEN_TILE, projected.device)
    block_p = min(tile.channels, triton.next_power_of_2(head_dim))
    _token_kernel[(heads * triton.cdiv(head_dim, block_p), rows.count)](
        projected,
        projected.stride(0),
        conv_state,
        *conv_state.stride()[:2],
        ssm_state,
        *ssm_state.stride()[:3],
        weights.conv_weight,
        *weights.conv_weight.stride(),
        weights.conv_bias,
        weights.a_log,
        weights.d,
        weights.dt_bias,
        y,
        rows.cu_seqlens,
        rows.slots,
        heads,
        heads // weights.groups,
        weights.groups * state_dim,
        head_dim=head_dim,
        state_dim=state_dim,
        taps=weights.conv_weight.shape[1],
        block_p=block_p,
        block_n=triton.next_power_of_2(state_dim),
        num_warps=tile.num_warps,
        **overlap(projected.device),
    )


def _scan_chunks(
    projected: Tensor,
    weights: MambaScanWeights,
    conv_state: Tensor,
    ssm_state: Tensor,
    rows: Rows,
    y: Tensor,
) -> None:
    """Launches conv and steps, then the scan over chunks; writes y [T, Di]."""
    heads, head_dim, state_dim = ssm_state.shape[1:]
    inner, shared = heads * head_dim, weights.groups * state_dim
    _, xbc, dt = projected.split((inner, inner + 2 * shared, heads), dim=-1)
    bias = weights.conv_bias
    conv, steps = prepare(
        xbc.unsqueeze(0),
        dt.unsqueeze(0),
        conv_state.unsqueeze(1),
        weights.conv_weight.unsqueeze(0),
        None if bias is None else bias.unsqueeze(0),
        weights.dt_bias.unsqueeze(0),
        rows,
        inner + 2 * shared,
    )
    foreign = _foreign_scan(projected, weights, ssm_state, rows)
    if foreign is not None:
        values, keys, queries = conv.split((inner, shared, shared), dim=-1)
        scanned = foreign(
            values.unflatten(-1, (heads, -1)),
            steps,
            weights.a_log,
            keys.unflatten(-1, (weights.groups, -1)),
            queries.unflatten(-1, (weights.groups, -1)),
            weights.d,
            ssm_state.index_select(0, rows.slots.long()),
        )
        y.copy_(scanned.flatten(2)[0])
        return
    side_by_side = None if is_deterministic() else tile_for(rows)
    if side_by_side is not None:
        scan_side_by_side(conv[0], steps[0], weights, ssm_state, rows, y, side_by_side)
        return
    tile = STEADY_TILE if is_deterministic() else tile_of(rows.max_seqlen)
    if tile.single_chunk and rows.max_seqlen <= tile.tokens:
        tile = tuned("scan_block", rows.count, tile, projected.device)
    _chunks_kernel[(heads * triton.cdiv(head_dim, tile.channels), rows.count)](
        conv,
        steps,
        ssm_state,
        *ssm_state.stride()[:3],
        weights.a_log,
        weights.d,
        y,
        rows.cu_seqlens,
        rows.slots,
        heads,
        heads // weights.groups,
        shared,
        head_dim=head_dim,
        state_dim=state_dim,
        block_l=tile.tokens,
        block_p=tile.channels,
        block_n=max(16, triton.next_power_of_2(state_dim)),
        single_chunk=tile.single_chunk,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **overlap(projected.device),
    )


def _foreign_scan(
    projected: Tensor, weights: MambaScanWeights, ssm_state: Tensor, rows: Rows
) -> Scan | None:
    """mamba-ssm's scan for a long piece of a single prompt, where it is installed and right; it
    computes chunks side by side. Only for bf16, whose rounding hides that of its TF32."""
    alone = rows.count == 1 and projected.shape[0] == rows.max_seqlen > LONGEST_BLOCK
    alone = alone and not is_deterministic()
    if not (alone and projected.is_cuda and projected.dtype == torch.bfloat16):
        return None
    heads, head_dim, state_dim = ssm_state.shape[1:]
    return load_verified(projected.device, heads, head_dim, weights.groups, state_dim)
