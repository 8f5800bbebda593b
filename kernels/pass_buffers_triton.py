# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The operators of pass_buffers.py, a launch each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower.kernels.overlap_triton import overlap, wait

_BLOCK = 256
# Tokens of a draft that are compared at a time.
_TOKENS = 16


@triton.jit
def _rows_kernel(
    sent,
    context,
    slots,
    context_lens,
    real,
    count,
    length,
    block: tl.constexpr,
    waits: tl.constexpr,
):
    """A program per block of tokens; those whose token is a row's first write the row."""
    wait(waits)
    token = tl.program_id(0) * block + tl.arange(0, block)
    row = token // length
    inside = row < count
    slot = tl.load(sent + row, mask=inside, other=-1)
    first = inside & (token % length == 0)
    tl.store(slots + row, slot.to(tl.int32), mask=first)
    seen = tl.load(context + row, mask=first, other=0)
    tl.store(context_lens + row, seen.to(tl.int32), mask=first)
    tl.store(real + token, slot >= 0, mask=inside)


@triton.jit
def _drawn_kernel(
    ids, confidences, log_probs, finite, out, count, block: tl.constexpr, waits: tl.constexpr
):
    wait(waits)
    index = tl.program_id(0) * block + tl.arange(0, block)
    inside = index < count
    tl.store(out + index, tl.load(ids + index, mask=inside).to(tl.float64), mask=inside)
    wide = tl.load(confidences + index, mask=inside).to(tl.float64)
    tl.store(out + count + index, wide, mask=inside)
    wide = tl.load(log_probs + index, mask=inside).to(tl.float64)
    tl.store(out + 2 * count + index, wide, mask=inside)
    wide = tl.load(finite + index, mask=inside).to(tl.float64)
    tl.store(out + 3 * count + index, wide, mask=inside)


@triton.jit
def _right_kernel(drawn, tokens, starts, slots, counts, block: tl.constexpr, waits: tl.constexpr):
    """A program per row."""
    wait(waits)
    row = tl.program_id(0)
    start = tl.load(starts + row)
    end = tl.load(starts + row + 1)
    right = 0
    if tl.load(slots + row) >= 0:
        # Tokens up to the first that is followed by another than the tower has drawn.
        place = start
        going = place < end
        while going:
            at = place + tl.arange(0, block)
            follows = at + 1 < end
            own = tl.load(drawn + at, mask=follows, other=-1)
            same = follows & (own == tl.load(tokens + at + 1, mask=follows, other=-2))
            agreeing = tl.min(tl.where(same, block, tl.arange(0, block)), axis=0)
            right += agreeing
            place += block
            going = (agreeing == block) & (place < end)
        right = tl.minimum(right + 1, end - start)
    tl.store(counts + row, right)


def unpack_rows(
    sent: Tensor, context: Tensor, slots: Tensor, context_lens: Tensor, length: int
) -> Tensor:
    """`slots` and `context_lens` [B] int32 in place, and [B * length] bool, as
    `pass_buffers.unpack_rows`."""
    count = slots.shape[0]
    for tensor in (sent, context, slots, context_lens):
        assert tensor.is_contiguous()
    real = torch.empty(count * length, dtype=torch.bool, device=slots.device)
    grid = (triton.cdiv(count * length, _BLOCK),)
    _rows_kernel[grid](
        sent,
        context,
        slots,
        context_lens,
        real,
        count,
        length,
        _BLOCK,
        **overlap(slots.device),
    )
    return real


def pack_drawn(drawn: Sequence[Tensor], out: Tensor) -> None:
    """The lines of `out` [4, n] fp64, as `pass_buffers.pack_drawn`."""
    count = out.shape[1]
    for tensor in (*drawn, out):
        assert tensor.is_contiguous()
        assert tensor.shape[-1] == count
    _drawn_kernel[(triton.cdiv(count, _BLOCK),)](
        *drawn,
        out,
        count,
        _BLOCK,
        **overlap(out.device),
    )


def right_counts(drawn: Tensor, tokens: Tensor, starts: Tensor, slots: Tensor) -> Tensor:
    """[B] int32, as `pass_buffers.right_counts`."""
    for tensor in (drawn, tokens, starts, slots):
        assert tensor.is_contiguous()
    counts = torch.empty_like(slots)
    _right_kernel[(slots.shape[0],)](
        drawn,
        tokens,
        starts,
        slots,
        counts,
        _TOKENS,
        num_warps=1,
        **overlap(slots.device),
    )
    return counts
