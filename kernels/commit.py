"""Commits masked positions of many blocks, on their device.

    first = the masked positions that the rule takes, which depend on the threshold
    fair = ceil(masked / steps left);  all masked at the last step
    n = min(masked, max(|first|, fair))

Committed are the n that come first in this order: those in `first` before all others, then the more
confident, of equals the leftmost. A committed token never changes. With c the confidences and t the
threshold, `first` of the rules is

    released   {i : c_i > t}
    leftmost   {i : c_i > t}, or the leftmost masked position where that is empty
    product    the leading run: with the masked positions from the left, c_1, c_2, ... c_k for the
               largest k with c_1 > t, c_1 c_2 > t, ... c_1 c_2 ... c_k > t; at least the first
    leading    as product, and fair = 0 before the last step: a draft, of which only what stands
               before the first wrong token counts

Products are fp32, each rounded, from the left: the same numbers on every device. The fair share is
at least one. A recorded quota replaces n. `ThresholdRule` of towers/decoding is the same for a
single block on the host; here it is in tensors, so that a step needs no host.
Source: released is the decoding loop of Nemotron-Labs-TwoTower; fast-dLLM's threshold rule, Wu et
al. 2025, section 3.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# A draft's rule is its place here.
RULES = ("released", "leftmost", "product", "leading")
_RELEASED, _LEFTMOST, _PRODUCT, _LEADING = range(len(RULES))


@dataclass(frozen=True)
class Drafts:
    """The blocks being denoised, by slot: S slots, W positions of the widest block, all contiguous.

    `tokens` [S, W] int64 hold the mask id where masked. `commit_steps` [S, W] int32: the step at
    which a position was committed, -1 where masked, 0 beyond the end of a shorter block.
    `confidences` and `log_probs` [S, W] fp32 are those of committed tokens. `step` [S] int32 is the
    next step's number, `steps` [S] int32 the most that a block takes, `threshold` [S] fp32 as
    `threshold_below` gives it, `rule` [S] int32 the place in RULES. `quota` [S, Q] int32: the
    number to commit at each step, -1 or no entry for the rule. `remaining` [S] int32 counts masked
    positions; -1 once a logit was not finite, and then it stays.
    """

    tokens: Tensor
    commit_steps: Tensor
    confidences: Tensor
    log_probs: Tensor
    step: Tensor
    steps: Tensor
    threshold: Tensor
    rule: Tensor
    quota: Tensor
    remaining: Tensor


def threshold_below(threshold: float) -> float:
    """The largest fp32 number that is not above `threshold`, an fp64 number: the same fp32
    confidences are above both."""
    nearest = torch.tensor(threshold, dtype=torch.float32)
    if float(nearest) > threshold:
        nearest = torch.nextafter(nearest, torch.tensor(-math.inf))
    return float(nearest)


def commit(
    drafts: Drafts,
    slots: Tensor,
    token: Tensor,
    confidence: Tensor,
    log_prob: Tensor,
    finite: Tensor,
) -> None:
    """One step of the drafts in `slots` [B] int32 (-1 is padding), whose blocks are all L long.

    Predictions are `token` int64, `confidence` and `log_prob` fp32 and `finite` bool, each [B, L];
    those at committed positions are ignored. A row with a masked position that is not `finite`
    commits nothing and gets -1 `remaining`. Such rows, and rows that are done, stay unchanged.
    """
    length = token.shape[1]
    masked = drafts.commit_steps[slots.clamp_min(0).long(), :length] < 0
    busy = (slots >= 0) & masked.any(1) & (drafts.remaining[slots.clamp_min(0).long()] >= 0)
    failed = busy & (masked & ~finite).any(1)
    drafts.remaining[slots[failed].long()] = -1
    rows = (busy & ~failed).nonzero().squeeze(1)
    row_slots, masked, confidence = slots[rows].long(), masked[rows], confidence[rows]
    first = _first(drafts, row_slots, masked, confidence)
    count = _count(drafts, row_slots, masked, first)
    chosen = masked & (_rank(masked, first, confidence) < count[:, None])
    row, position = chosen.nonzero(as_tuple=True)
    index = row_slots[row], position
    drafts.tokens[index] = token[rows][chosen]
    drafts.commit_steps[index] = drafts.step[row_slots[row]]
    drafts.confidences[index] = confidence[chosen]
    drafts.log_probs[index] = log_prob[rows][chosen]
    drafts.remaining[row_slots] = (masked.sum(1) - count).int()
    drafts.step[row_slots] += 1


def select_masked(drafts: Drafts, slots: Tensor, length: int) -> Tensor:
    """Indices of the masked tokens in a pass over the blocks of `slots` [B] int32 (-1 is padding),
    `length` tokens each: in ascending order, then -1; [B * length] int32. Only they need logits."""
    masked = drafts.commit_steps[slots.clamp_min(0).long(), :length] < 0
    wanted = (masked & (slots >= 0)[:, None]).flatten().nonzero().squeeze(1)
    lines = torch.full((slots.shape[0] * length,), -1, dtype=torch.int32, device=slots.device)
    lines[: len(wanted)] = wanted.int()
    return lines


def _first(drafts: Drafts, slots: Tensor, masked: Tensor, confidence: Tensor) -> Tensor:
    """Masked positions that each row's rule takes, bool [R, L]; masked and confidence [R, L]."""
    threshold, rule = drafts.threshold[slots, None], drafts.rule[slots, None]
    above = masked & (confidence > threshold)
    leftmost = masked & (masked.cumsum(1) == 1)
    fallback = leftmost & (rule == _LEFTMOST) & ~above.any(1, keepdim=True)
    runs = rule >= _PRODUCT
    if not bool(runs.any()):
        return above | fallback
    return torch.where(runs, _run(masked, confidence, threshold) | leftmost, above | fallback)


def _run(masked: Tensor, confidence: Tensor, threshold: Tensor) -> Tensor:
    """Leading masked positions of each row while the product is above the threshold, [R, L]."""
    product = torch.ones_like(threshold[:, 0])
    products = []
    # One after another: a scan may multiply in another order, and in another precision.
    for taken, factor in zip(masked.unbind(1), confidence.unbind(1), strict=True):
        product = torch.where(taken, product * factor, product)
        products.append(product)
    failed = masked & ~(torch.stack(products, 1) > threshold)
    return masked & (failed.cumsum(1) == 0)


def _count(drafts: Drafts, slots: Tensor, masked: Tensor, first: Tensor) -> Tensor:
    """Number of positions to commit in each row, [R] int64; masked and first [R, L]."""
    total = masked.sum(1)
    left = (drafts.steps[slots] - drafts.step[slots]).clamp_min(1)
    fair = (total + left - 1) // left
    fair = torch.where((drafts.rule[slots] == _LEADING) & (left > 1), 0, fair)
    count = torch.maximum(first.sum(1), fair)
    step, known = drafts.step[slots].long(), drafts.quota.shape[1]
    if known:
        quota = drafts.quota[slots, step.clamp_max(known - 1)]
        count = torch.where((quota >= 0) & (step < known), quota.long(), count)
    return torch.minimum(count, total)


def _rank(masked: Tensor, first: Tensor, confidence: Tensor) -> Tensor:
    """Rank of each position, [R, L]: the number of masked positions in its row that come before it
    in the order of commits."""
    other, this = confidence[:, None, :], confidence[:, :, None]
    index = torch.arange(confidence.shape[1], device=confidence.device)
    ahead = (other > this) | ((other == this) & (index < index[:, None]))
    sooner, same = first[:, None, :] & ~first[:, :, None], first[:, None, :] == first[:, :, None]
    return ((sooner | (same & ahead)) & masked[:, None, :]).sum(2)
