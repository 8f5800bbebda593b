# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The operators of draft_lines.py, a launch each: a program per row, or per line."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower.kernels.commit import Drafts
from twotower.kernels.draft_lines import WORDS, DraftSampling
from twotower.kernels.overlap_triton import overlap, wait
from twotower.kernels.unmask import SamplingBatch

_KEY, _START, _DOMAIN, _FIXED_STEP, _EOS, _EOS_FROM = (
    tl.constexpr(WORDS.index(name))
    for name in ("key", "start", "domain", "fixed_step", "eos", "eos_from")
)
_NUM_WORDS = tl.constexpr(len(WORDS))
_LINES = 256


@triton.jit
def _read_kernel(
    tokens, remaining, slots, block, masked, width, length, lanes: tl.constexpr, waits: tl.constexpr
):
    """A program per row."""
    wait(waits)
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, lanes)
    inside = index < length
    slot = tl.load(slots + row).to(tl.int64)
    real = tl.maximum(slot, 0)
    own = tl.load(tokens + real * width + index, mask=inside, other=0)
    tl.store(block + row * length + index, own, mask=inside)
    left = tl.load(remaining + real)
    left = tl.where(slot >= 0, tl.minimum(tl.maximum(left, 0), length), 0).to(tl.int64)
    tl.store(masked + row * length + index, left + tl.zeros([lanes], tl.int64), mask=inside)


@triton.jit
def _lines_kernel(
    hidden,
    lines,
    slots,
    words,
    temperature,
    step,
    picked,
    temperatures,
    numbers,
    count,
    length,
    total,
    width,
    hidden_stride,
    excluded,
    block: tl.constexpr,
    waits: tl.constexpr,
):
    """A program per line; `numbers` [6, M] are key, position, step, domain, excluded, barred."""
    wait(waits)
    line = tl.program_id(0).to(tl.int64)
    token = tl.load(lines + line).to(tl.int64)
    token = tl.where(token >= 0, token, total - 1)
    columns = tl.arange(0, block)
    inside = columns < width
    values = tl.load(hidden + token * hidden_stride + columns, mask=inside, other=0.0)
    tl.store(picked + line * width + columns, values, mask=inside)
    slot = tl.maximum(tl.load(slots + token // length), 0).to(tl.int64)
    own = words + slot * _NUM_WORDS
    position = tl.load(own + _START) + token % length
    moving = tl.load(own + _FIXED_STEP) <= 0
    early = position < tl.load(own + _EOS_FROM)
    tl.store(temperatures + line, tl.load(temperature + slot))
    tl.store(numbers + line, tl.load(own + _KEY))
    tl.store(numbers + count + line, position)
    drawn_at = tl.where(moving, tl.load(step + slot), 0).to(tl.int64)
    tl.store(numbers + 2 * count + line, drawn_at)
    tl.store(numbers + 3 * count + line, tl.load(own + _DOMAIN))
    tl.store(numbers + 4 * count + line, excluded)
    tl.store(numbers + 5 * count + line, tl.where(early, tl.load(own + _EOS), -1))


@triton.jit
def _spread_kernel(
    ids,
    confidences,
    log_probs,
    finite,
    lines,
    ids_out,
    confidences_out,
    log_probs_out,
    finite_out,
    count,
    block: tl.constexpr,
    waits: tl.constexpr,
):
    """A program per block of lines."""
    wait(waits)
    line = tl.program_id(0) * block + tl.arange(0, block)
    token = tl.load(lines + line, mask=line < count, other=-1)
    wanted = token >= 0
    tl.store(ids_out + token, tl.load(ids + line, mask=wanted), mask=wanted)
    tl.store(confidences_out + token, tl.load(confidences + line, mask=wanted), mask=wanted)
    tl.store(log_probs_out + token, tl.load(log_probs + line, mask=wanted), mask=wanted)
    tl.store(finite_out + token, tl.load(finite + line, mask=wanted), mask=wanted)


@triton.jit
def _pack_kernel(
    tokens,
    commit_steps,
    confidences,
    log_probs,
    remaining,
    slots,
    out,
    width,
    length,
    lanes: tl.constexpr,
    waits: tl.constexpr,
):
    """A program per row."""
    wait(waits)
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, lanes)
    inside = index < length
    slot = tl.maximum(tl.load(slots + row), 0).to(tl.int64)
    at = slot * width + index
    line = out + row * (1 + 4 * length)
    tl.store(line, tl.load(remaining + slot).to(tl.float64))
    line += 1
    tl.store(line + index, tl.load(tokens + at, mask=inside).to(tl.float64), mask=inside)
    wide = tl.load(commit_steps + at, mask=inside).to(tl.float64)
    tl.store(line + length + index, wide, mask=inside)
    wide = tl.load(confidences + at, mask=inside).to(tl.float64)
    tl.store(line + 2 * length + index, wide, mask=inside)
    wide = tl.load(log_probs + at, mask=inside).to(tl.float64)
    tl.store(line + 3 * length + index, wide, mask=inside)


def read_blocks(drafts: Drafts, slots: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Tokens and masked positions [B * length] int64, as `draft_lines.read_blocks`."""
    rows, width = slots.shape[0], drafts.tokens.shape[1]
    assert length <= width
    block, masked = (
        torch.empty(rows * length, dtype=torch.int64, device=slots.device) for _ in range(2)
    )
    given = (drafts.tokens, drafts.remaining, slots, block, masked, width, length)
    _read_kernel[(rows,)](
        *given,
        triton.next_power_of_2(length),
        num_warps=1,
        **overlap(slots.device),
    )
    return block, masked


def read_lines(
    hidden: Tensor,
    lines: Tensor,
    drafts: Drafts,
    slots: Tensor,
    sampling: DraftSampling,
    length: int,
) -> tuple[Tensor, SamplingBatch]:
    """Hidden states [M, H] and how to draw them, as `draft_lines.read_lines`."""
    count, (total, width) = lines.shape[0], hidden.shape
    assert hidden.stride(1) == 1
    for tensor in (lines, slots, sampling.words, sampling.temperature, drafts.step):
        assert tensor.is_contiguous()
    picked = torch.empty((count, width), dtype=hidden.dtype, device=hidden.device)
    temperatures = torch.empty(count, dtype=torch.float32, device=hidden.device)
    numbers = torch.empty((6, count), dtype=torch.int64, device=hidden.device)
    _lines_kernel[(count,)](
        hidden,
        lines,
        slots,
        sampling.words,
        sampling.temperature,
        drafts.step,
        picked,
        temperatures,
        numbers,
        count,
        length,
        total,
        width,
        hidden.stride(0),
        sampling.mask,
        triton.next_power_of_2(width),
        **overlap(hidden.device),
    )
    return picked, SamplingBatch(temperatures, *numbers)


def spread_lines(
    drawn: Sequence[Tensor], lines: Tensor, rows: int, length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Predictions [rows, length], as `draft_lines.spread_lines`; without a line not written."""
    ids, confidences, log_probs, finite = (
        torch.empty(rows, length, dtype=part.dtype, device=part.device) for part in drawn
    )
    count = lines.shape[0]
    for tensor in (*drawn, lines):
        assert tensor.is_contiguous()
    grid = (triton.cdiv(count, _LINES),)
    placed = (ids, confidences, log_probs, finite)
    _spread_kernel[grid](
        *drawn,
        lines,
        *placed,
        count,
        _LINES,
        **overlap(lines.device),
    )
    return placed


def pack_drafts(drafts: Drafts, slots: Tensor, out: Tensor) -> None:
    """`out` [B, 1 + 4 length] fp64, as `draft_lines.pack_drafts`."""
    rows, length = slots.shape[0], out.shape[1] // 4
    assert out.is_contiguous()
    parts = (drafts.tokens, drafts.commit_steps, drafts.confidences, drafts.log_probs)
    given = (*parts, drafts.remaining, slots, out, drafts.tokens.shape[1], length)
    _pack_kernel[(rows,)](
        *given,
        triton.next_power_of_2(length),
        num_warps=1,
        **overlap(slots.device),
    )
