# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""`commit` and `select_masked` of commit.py as Triton kernels: a program per row, which alone
writes the row's slot, and a single program for the list of masked tokens.

Sources as in commit.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower.kernels.commit import RULES, Drafts
from twotower.kernels.overlap_triton import overlap, wait

# Pairs of positions compared at a time: all pairs of a block of up to 64 positions.
_PAIRS = 4096
_LEFTMOST, _PRODUCT, _LEADING = (
    tl.constexpr(RULES.index(name)) for name in ("leftmost", "product", "leading")
)
# Tokens that `select_masked` reads at a time.
_CHUNK = 1024


@triton.jit
def _commit_kernel(
    tokens,
    commit_steps,
    confidences,
    log_probs,
    step,
    steps,
    threshold,
    rule,
    quota,
    remaining,
    slots,
    token,
    confidence,
    log_prob,
    finite,
    width,
    length,
    token_stride,
    confidence_stride,
    log_prob_stride,
    finite_stride,
    quotas,
    block: tl.constexpr,
    chunk: tl.constexpr,
    waits: tl.constexpr,
):
    """A program per row: the whole step of the draft in its slot."""
    wait(waits)
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    if slot < 0:
        return
    index = tl.arange(0, block)
    inside = index < length
    offsets = slot * width + index
    masked = tl.load(commit_steps + offsets, mask=inside, other=0) < 0
    row_confidence = confidence + row * confidence_stride
    masked_confidence = tl.load(row_confidence + index, mask=masked, other=0.0)
    masked_finite = tl.load(finite + row * finite_stride + index, mask=masked, other=1)
    total = tl.sum(masked.to(tl.int32), axis=0)
    nonfinite = tl.sum((masked & (masked_finite == 0)).to(tl.int32), axis=0)
    busy = (total > 0) & (tl.load(remaining + slot) >= 0)

    step_number = tl.load(step + slot)
    left = tl.maximum(tl.load(steps + slot) - step_number, 1)
    least = tl.load(threshold + slot)
    own_rule = tl.load(rule + slot)
    above = masked & (masked_confidence > least)
    # First come the masked positions before `run_end`, and without a run those above the threshold.
    leftmost = tl.min(tl.where(masked, index, block), axis=0)
    none_above = tl.sum(above.to(tl.int32), axis=0) == 0
    run_end = tl.where((own_rule == _LEFTMOST) & none_above, leftmost + 1, 0)
    runs = own_rule >= _PRODUCT
    if runs & busy:
        run_end = leftmost + 1
        product = tl.load(row_confidence + leftmost)
        while (product > least) & (run_end < length):
            # Of a committed position there may be no prediction.
            taken = tl.load(commit_steps + slot * width + run_end) < 0
            factor = tl.load(row_confidence + run_end)
            product = tl.where(taken, product * factor, product)
            run_end = tl.where(product > least, run_end + 1, run_end)
    least = tl.where(runs, float("inf"), least)
    is_first = masked & ((index < run_end) | (masked_confidence > least))
    firsts = tl.sum(is_first.to(tl.int32), axis=0)
    fair = tl.where((own_rule == _LEADING) & (left > 1), 0, (total + left - 1) // left)
    count = tl.maximum(firsts, fair)
    fixed_count = tl.load(quota + slot * quotas + step_number, mask=step_number < quotas, other=-1)
    count = tl.minimum(tl.where(fixed_count >= 0, fixed_count, count), total)
    count = tl.where(busy & (nonfinite == 0), count, 0)

    rank = tl.zeros([block], tl.int32)
    for first in range(0, block, chunk):
        other = first + tl.arange(0, chunk)
        other_steps = tl.load(commit_steps + slot * width + other, mask=other < length, other=0)
        other_confidence = tl.load(row_confidence + other, mask=other < length, other=0.0)
        other_first = (other < run_end) | (other_confidence > least)
        sooner = other_first[None, :] & (is_first == 0)[:, None]
        same = other_first[None, :] == is_first[:, None]
        equal = other_confidence[None, :] == masked_confidence[:, None]
        equal_left = equal & (other[None, :] < index[:, None])
        ahead = (other_confidence[None, :] > masked_confidence[:, None]) | equal_left
        ahead = sooner | (same & ahead)
        rank += tl.sum((ahead & (other_steps < 0)[None, :]).to(tl.int32), axis=1)
    chosen = masked & (rank < count)
    chosen_token = tl.load(token + row * token_stride + index, mask=chosen, other=0)
    chosen_log_prob = tl.load(log_prob + row * log_prob_stride + index, mask=chosen, other=0.0)

    # Every thread has to have read the row's state before any writes it.
    tl.debug_barrier()
    tl.store(tokens + offsets, chosen_token, mask=chosen)
    tl.store(commit_steps + offsets, tl.zeros([block], tl.int32) + step_number, mask=chosen)
    tl.store(confidences + offsets, masked_confidence, mask=chosen)
    tl.store(log_probs + offsets, chosen_log_prob, mask=chosen)
    tl.store(remaining + slot, tl.where(nonfinite > 0, -1, total - count), mask=busy)
    tl.store(step + slot, step_number + 1, mask=busy & (nonfinite == 0))


@triton.jit
def _select_kernel(
    commit_steps, slots, lines, width, length, total, chunk: tl.constexpr, waits: tl.constexpr
):
    """A single program over all tokens: indices of masked tokens fill `lines` from its beginning,
    every other token writes -1 from its end."""
    wait(waits)
    found = tl.full([], 0, tl.int32)
    for first in range(0, total, chunk):
        index = first + tl.arange(0, chunk)
        inside = index < total
        slot = tl.load(slots + index // length, mask=inside, other=-1)
        live = inside & (slot >= 0)
        offsets = slot.to(tl.int64) * width + index % length
        masked = tl.load(commit_steps + offsets, mask=live, other=0) < 0
        before = found + tl.cumsum(masked.to(tl.int32), axis=0)
        tl.store(lines + before - 1, index, mask=masked)
        # Of the tokens up to `index`, those not masked, counted back from the end.
        tl.store(lines + total - 1 - index + before, -1, mask=inside & ~masked)
        found += tl.sum(masked.to(tl.int32), axis=0)


def commit(
    drafts: Drafts,
    slots: Tensor,
    token: Tensor,
    confidence: Tensor,
    log_prob: Tensor,
    finite: Tensor,
) -> None:
    """One step of the drafts in `slots` [B] int32, in place, as `commit.commit`; predictions [B, L]
    with adjacent positions of a row."""
    count, length = token.shape
    width = drafts.tokens.shape[1]
    assert slots.shape == (count,)
    assert length <= width
    predictions = (token, confidence, log_prob, finite)
    for tensor in predictions:
        assert tensor.shape == (count, length)
        assert tensor.stride(1) == 1
    for tensor in (*vars(drafts).values(), slots):
        assert tensor.is_contiguous()
    if not count:
        return
    block = triton.next_power_of_2(length)
    _commit_kernel[count,](
        drafts.tokens,
        drafts.commit_steps,
        drafts.confidences,
        drafts.log_probs,
        drafts.step,
        drafts.steps,
        drafts.threshold,
        drafts.rule,
        drafts.quota,
        drafts.remaining,
        slots,
        *predictions,
        width,
        length,
        *(tensor.stride(0) for tensor in predictions),
        drafts.quota.shape[1],
        block,
        min(block, _PAIRS // block),
        num_warps=4 if block > 16 else 1,
        **overlap(slots.device),
    )


def select_masked(drafts: Drafts, slots: Tensor, length: int) -> Tensor:
    """slots [B] int32 -> indices of masked tokens [B * length] int32, as `commit.select_masked`."""
    total, width = slots.shape[0] * length, drafts.commit_steps.shape[1]
    assert length <= width
    for tensor in (drafts.commit_steps, slots):
        assert tensor.is_contiguous()
    lines = torch.empty(total, dtype=torch.int32, device=slots.device)
    if total:
        chunk = min(_CHUNK, triton.next_power_of_2(total))
        _select_kernel[1,](
            drafts.commit_steps,
            slots,
            lines,
            width,
            length,
            total,
            chunk,
            num_warps=4,
            **overlap(slots.device),
        )
    return lines
