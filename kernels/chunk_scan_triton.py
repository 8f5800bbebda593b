# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The scan of long rows in three launches whose programs do not wait for each other's chunks.

A row is cut into chunks of C tokens from its first token on. With cum_i the sum of step_k A over
the tokens k <= i of a chunk, and h_c the state before chunk c:

    S_c     = sum over j of exp(cum_C - cum_j) step_j x_j B_j^T              a program per chunk
    h_{c+1} = exp(cum_C) h_c + S_c                          a program per slice of the state
    y_i     = sum over j <= i of (C_i B_j) exp(cum_i - cum_j) step_j x_j
              + exp(cum_i) h_c C_i + D x_i                                   a program per chunk

States are passed on in the order of the chunks, so a row's bits depend on the row alone. Sums of
steps between two tokens are summed by themselves: differences of sums from the chunk's start would
lose digits as those grow, and chunks are twice as long as those of a walk from chunk to chunk.

The S_c of a pass are [chunks, heads, P, N] fp32, 2 MiB a chunk at 64 heads, P = 64, N = 128; heads
take turns where those of all heads are more than SCAN_SCRATCH_BYTES.
Source: Dao and Gu 2024 (Mamba-2), section 6.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower.kernels.exact_products_triton import operand, product
from twotower.kernels.launch_table import tuned
from twotower.kernels.mamba_scan import SCAN_SCRATCH_BYTES, MambaScanWeights
from twotower.kernels.overlap_triton import overlap, wait
from twotower.kernels.rows import Rows


@dataclass(frozen=True)
class ChunkTile:
    """Tokens of a chunk, and for the launches of its states and its outputs the channels of a head
    in a program and its warps. A program that passes states on has `passed` of their numbers.
    `least_tokens` of the longest row are scanned so, fewer by a walk from chunk to chunk."""

    tokens: int
    state_channels: int
    state_warps: int
    output_channels: int
    output_warps: int
    passed: int
    passing_warps: int
    least_tokens: int


# Side by side from the first token above a block: another bound in between would be one more thing
# that a row's bits depend on.
TILE = ChunkTile(
    tokens=64,
    state_channels=64,
    state_warps=4,
    output_channels=32,
    output_warps=4,
    passed=1024,
    passing_warps=4,
    least_tokens=65,
)
# Rows among which a program looks for its own: kernels are compiled anew for more.
_FEWEST_ROWS = 256


def tile_for(rows: Rows) -> ChunkTile | None:
    """How the chunks of a pass's rows are scanned side by side; None if they are to be walked. By
    the longest row and not by the number of rows: a row would have other bits in another batch."""
    tile = tuned("scan_piece", rows.max_seqlen, TILE, rows.slots.device)
    return tile if rows.max_seqlen >= tile.least_tokens else None


@triton.jit
def _find(cu_seqlens, slots, index, row_count, block_l: tl.constexpr, block_r: tl.constexpr):
    """The row that chunk `index` of a pass belongs to, its slot, first token and length, and the
    chunk's first token in it; a length of 0 if there is nothing in the chunk.

    Row r's chunks are numbered from cu_seqlens[r] // C + r on, which leaves room for all of them.
    """
    r = tl.arange(0, block_r)
    starts = tl.load(cu_seqlens + r, mask=r < row_count, other=0)
    before = (r < row_count) & (starts // block_l + r <= index)
    row = tl.sum(before.to(tl.int32), 0) - 1
    slot = tl.load(slots + row).to(tl.int64)
    start = tl.load(cu_seqlens + row)
    length = tl.load(cu_seqlens + row + 1) - start
    first = (index - start // block_l - row) * block_l
    length = tl.where((slot >= 0) & (first < length), length, 0)
    return slot, start.to(tl.int64), length, first


@triton.jit(do_not_specialize=["row_count", "first_head"])
def _states_kernel(
    conv,
    steps,
    a_log,
    states,
    totals,
    cu_seqlens,
    slots,
    row_count,
    first_head,
    heads,
    scratch_heads,
    per_group,
    shared_channels,
    head_dim: tl.constexpr,
    state_dim: tl.constexpr,
    block_l: tl.constexpr,
    block_p: tl.constexpr,
    block_n: tl.constexpr,
    block_r: tl.constexpr,
    waits: tl.constexpr,
):
    """A program per (head and slice of P, chunk): what the chunk adds to the state, and its sum of
    steps. Of a row's last chunk nobody needs them."""
    wait(waits)
    slices: tl.constexpr = (head_dim + block_p - 1) // block_p
    index = tl.program_id(1)
    _, start, length, first = _find(cu_seqlens, slots, index, row_count, block_l, block_r)
    if first + block_l >= length:
        return
    own = tl.program_id(0) // slices
    head = first_head + own
    p = tl.program_id(0) % slices * block_p + tl.arange(0, block_p)
    column = tl.arange(0, block_n)
    i = tl.arange(0, block_l)
    token = start + first + i
    channels = heads * head_dim + 2 * shared_channels
    # All tokens are the row's: it goes on behind the chunk.
    x = tl.load(
        conv + token[:, None] * channels + head * head_dim + p[None, :],
        mask=(p < head_dim)[None, :],
        other=0.0,
    )
    key_at = conv + token * channels + heads * head_dim + head // per_group * state_dim
    keys = tl.load(key_at[:, None] + column[None, :], mask=(column < state_dim)[None, :], other=0.0)
    rate = -tl.exp(tl.load(a_log + head).to(tl.float32))
    step_at = steps + token * heads + head
    step = tl.load(step_at)
    later = tl.load(step_at + heads, mask=i < block_l - 1, other=0.0) * rate
    to_end = tl.exp(tl.cumsum(later, 0, reverse=True))
    added = x.to(tl.float32) * (step * to_end)[:, None]
    state = product(tl.trans(added), operand(keys))
    written = (index.to(tl.int64) * scratch_heads + own) * head_dim * state_dim
    tl.store(
        states + written + p[:, None] * state_dim + column[None, :],
        state,
        mask=(p < head_dim)[:, None] & (column < state_dim)[None, :],
    )
    if tl.program_id(0) % slices == 0:
        tl.store(totals + index * scratch_heads + own, tl.sum(step * rate, 0))


@triton.jit(do_not_specialize=["first_head"])
def _passing_kernel(
    ssm_state,
    ssm_state_stride_s,
    ssm_state_stride_h,
    ssm_state_stride_p,
    states,
    totals,
    cu_seqlens,
    slots,
    first_head,
    scratch_heads,
    head_dim: tl.constexpr,
    state_dim: tl.constexpr,
    block_l: tl.constexpr,
    block: tl.constexpr,
    waits: tl.constexpr,
):
    """A program per (head and part of its state, row): puts the state after each chunk but the last
    where the chunk's own stood."""
    wait(waits)
    size: tl.constexpr = head_dim * state_dim
    parts: tl.constexpr = (size + block - 1) // block
    row = tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    start = tl.load(cu_seqlens + row)
    length = tl.load(cu_seqlens + row + 1) - start
    if slot < 0 or length <= block_l:
        return
    own = tl.program_id(0) // parts
    number = tl.program_id(0) % parts * block + tl.arange(0, block)
    inside = number < size
    state_at = ssm_state + slot * ssm_state_stride_s + (first_head + own) * ssm_state_stride_h
    state_at += number // state_dim * ssm_state_stride_p + number % state_dim
    state = tl.load(state_at, mask=inside, other=0.0)
    chunk = (start // block_l + row).to(tl.int64) * scratch_heads + own
    at = states + chunk * size + number
    total_at = totals + chunk
    added = tl.load(at, mask=inside, other=0.0)
    for first in range(0, length - block_l, block_l):
        # The next chunk's, while this one's is passed on.
        coming = number < tl.where(first + 2 * block_l < length, size, 0)
        following = tl.load(at + scratch_heads * size, mask=coming, other=0.0)
        state = tl.fma(state, tl.exp(tl.load(total_at)), added)
        tl.store(at, state, mask=inside)
        at += scratch_heads * size
        total_at += scratch_heads
        added = following


@triton.jit(do_not_specialize=["row_count", "first_head"])
def _outputs_kernel(
    conv,
    steps,
    ssm_state,
    ssm_state_stride_s,
    ssm_state_stride_h,
    ssm_state_stride_p,
    a_log,
    d,
    states,
    y,
    cu_seqlens,
    slots,
    row_count,
    first_head,
    heads,
    scratch_heads,
    per_group,
    shared_channels,
    head_dim: tl.constexpr,
    state_dim: tl.constexpr,
    block_l: tl.constexpr,
    block_p: tl.constexpr,
    block_n: tl.constexpr,
    block_r: tl.constexpr,
    waits: tl.constexpr,
):
    """A program per (head and slice of P, chunk): the outputs of its tokens, from the state before
    them."""
    wait(waits)
    slices: tl.constexpr = (head_dim + block_p - 1) // block_p
    index = tl.program_id(1)
    slot, start, length, first = _find(cu_seqlens, slots, index, row_count, block_l, block_r)
    if length == 0:
        return
    own = tl.program_id(0) // slices
    head = first_head + own
    inner = heads * head_dim
    channels = inner + 2 * shared_channels
    p = tl.program_id(0) % slices * block_p + tl.arange(0, block_p)
    column = tl.arange(0, block_n)
    i = tl.arange(0, block_l)
    token = start + first + i
    live = first + i < length
    shared = live[:, None] & (column < state_dim)[None, :]
    key_at = conv + token * channels + inner + head // per_group * state_dim
    key_at = key_at[:, None] + column[None, :]
    keys = operand(tl.load(key_at, mask=shared, other=0.0))
    queries = operand(tl.load(key_at + shared_channels, mask=shared, other=0.0))
    step = tl.load(steps + token * heads + head, mask=live, other=0.0)
    decayed = step * -tl.exp(tl.load(a_log + head).to(tl.float32))
    # Sums from behind j to i. The exponent is masked, not its result.
    between = tl.cumsum(tl.where(i[:, None] > i[None, :], decayed[:, None], 0.0), 0)
    decay = tl.exp(tl.where(i[:, None] >= i[None, :], between, float("-inf")))
    weights = product(queries, tl.trans(keys)) * decay * step[None, :]

    before = states + ((index.to(tl.int64) - 1) * scratch_heads + own) * head_dim * state_dim
    given = ssm_state + slot * ssm_state_stride_s + head * ssm_state_stride_h
    state_at = tl.where(
        first > 0,
        before + p[:, None] * state_dim + column[None, :],
        given + p[:, None] * ssm_state_stride_p + column[None, :],
    )
    state = tl.load(
        state_at, mask=(p < head_dim)[:, None] & (column < state_dim)[None, :], other=0.0
    )
    out = product(queries, tl.trans(state)) * tl.exp(tl.cumsum(decayed, 0))[:, None]
    inside = live[:, None] & (p < head_dim)[None, :]
    at = head * head_dim + p[None, :]
    x = operand(tl.load(conv + token[:, None] * channels + at, mask=inside, other=0.0))
    out += product(weights, x) + tl.load(d + head).to(tl.float32) * x.to(tl.float32)
    tl.store(y + token[:, None] * inner + at, out, mask=inside)


def scan_side_by_side(
    conv: Tensor,
    steps: Tensor,
    weights: MambaScanWeights,
    ssm_state: Tensor,
    rows: Rows,
    y: Tensor,
    tile: ChunkTile = TILE,
) -> None:
    """conv [T, Cd] and steps [T, H] fp32 as `prepare` gives them, ssm_state [S, H, P, N] fp32; y
    [T, Di] fp32 is written where a row's tokens are."""
    heads, head_dim, state_dim = ssm_state.shape[1:]
    assert all(tensor.is_contiguous() for tensor in (conv, steps, y))
    # As many as `_find` may number: one more for each row than its full chunks.
    chunks = len(conv) // tile.tokens + rows.count
    at_once = max(1, min(heads, SCAN_SCRATCH_BYTES // (chunks * head_dim * state_dim * 4)))
    size = chunks, at_once, head_dim, state_dim
    states = torch.empty(size, dtype=torch.float32, device=conv.device)
    totals = torch.empty(size[:2], dtype=torch.float32, device=conv.device)
    for first in range(0, heads, at_once):
        count = min(at_once, heads - first)
        _scan_heads(conv, steps, weights, ssm_state, rows, y, tile, states, totals, first, count)


def _scan_heads(
    conv: Tensor,
    steps: Tensor,
    weights: MambaScanWeights,
    ssm_state: Tensor,
    rows: Rows,
    y: Tensor,
    tile: ChunkTile,
    states: Tensor,
    totals: Tensor,
    first: int,
    count: int,
) -> None:
    """The three launches for heads first..first+count-1, with room for their states."""
    heads, head_dim, state_dim = ssm_state.shape[1:]
    chunks, scratch_heads = totals.shape
    sizes = {"head_dim": head_dim, "state_dim": state_dim, "block_l": tile.tokens}
    wide = {"block_n": max(16, triton.next_power_of_2(state_dim))}
    wide["block_r"] = max(_FEWEST_ROWS, triton.next_power_of_2(rows.count))
    of_rows = rows.cu_seqlens, rows.slots
    of_heads = heads, scratch_heads, heads // weights.groups, weights.groups * state_dim
    given = ssm_state, *ssm_state.stride()[:3]

    block_p = min(tile.state_channels, max(16, triton.next_power_of_2(head_dim)))
    _states_kernel[(count * triton.cdiv(head_dim, block_p), chunks)](
        *(conv, steps, weights.a_log, states, totals, *of_rows, rows.count, first, *of_heads),
        **sizes,
        **wide,
        block_p=block_p,
        num_warps=tile.state_warps,
        **overlap(conv.device),
    )
    block = min(tile.passed, triton.next_power_of_2(head_dim * state_dim))
    _passing_kernel[(count * triton.cdiv(head_dim * state_dim, block), rows.count)](
        *(*given, states, totals, *of_rows, first, scratch_heads),
        **sizes,
        block=block,
        num_warps=tile.passing_warps,
        **overlap(conv.device),
    )
    block_p = min(tile.output_channels, max(16, triton.next_power_of_2(head_dim)))
    _outputs_kernel[(count * triton.cdiv(head_dim, block_p), chunks)](
        *(conv, steps, *given, weights.a_log, weights.d, states, y),
        *(*of_rows, rows.count, first, *of_heads),
        **sizes,
        **wide,
        block_p=block_p,
        num_warps=tile.output_warps,
        **overlap(conv.device),
    )
