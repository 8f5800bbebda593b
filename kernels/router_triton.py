# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The router of moe.py on a GPU: a product, then a program per token for the choice.

    s = sigmoid(W x);  choice by s + bias, weights from s alone

The second launch also sorts what it chose for the products: of few tokens whole, by the program
that ends last, of more by counting into which block of tokens each choice falls, and a third launch
places the pairs.

The choice is that of fp64. With a narrow weight tensor cores make the product, in pieces of the
inner dimension that are added in fp64: products of two bf16 are exact in fp32, so only the sum
within a piece is rounded. Experts so close to the border of the choice that this rounding could
decide are computed again in fp64; the order of ids is that of the scores after this. Without a
narrow weight the product is torch's in fp64.
Source: Liu et al. 2024 (DeepSeek-V3), section 2.1.2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower.kernels.determinism import is_deterministic
from twotower.kernels.expert_tiles_triton import (
    BLOCK,
    PAIRS_OF_ONE_WARP,
    Tiles,
    place,
    place_block,
)
from twotower.kernels.experts_triton import tiling_of
from twotower.kernels.moe import RouterRule, Routing
from twotower.kernels.overlap_triton import overlap, wait

PIECE = 128
_EXPERTS_AT_ONCE = 64
# Scores differ from those of fp64 by 1e-6, a few times that where some channels are much larger
# than the others: experts within this distance of the border are computed again. A token in a
# thousand has such experts. At 1e-4 a token in 120 had, and hardly a pass of 256 was without.
_MARGIN = 1e-5
# Elements of a row that the second computation loads at a time.
_EXACT_PIECE = 1024
# Up to so many tokens one warp sorts all pairs in about the time of a launch; at most BLOCK.
SORTED_AT_ONCE = 32


def route(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    rule: RouterRule,
    real: Tensor | None = None,
    narrow: Tensor | None = None,
) -> Routing:
    """x [T, H], weight [E, H] fp64, bias [E] -> expert ids [T, k] int64, weights [T, k] fp32 and
    their tiles, cut as `experts_triton.tiling_of` says.

    Of equal choice scores the lower expert id wins; tokens that are not `real` [T] bool get no
    expert, id -1. `narrow` [P, E, H] bf16 are parts that add up to `weight` (`moe.narrow_parts`),
    used for bf16 tokens where experts have no groups. Without them torch sums in an order that
    depends on T, which changes choices only where scores agree to about 1e-15.
    """
    tokens, count = x.shape[0], weight.shape[0]
    ids = torch.empty(tokens, rule.top_k, dtype=torch.int64, device=x.device)
    weights = torch.empty(tokens, rule.top_k, dtype=torch.float32, device=x.device)
    tiles = Tiles.empty(ids.numel(), count, tiling_of(tokens, x.dtype, x.device).rows, x.device)
    if tokens == 0:
        return Routing(ids, weights)
    blocks = triton.cdiv(tokens, BLOCK)
    pieces = 0
    # Choices of each block and expert, and how many tokens have been chosen for.
    shape = (blocks * count + 1,)
    if narrow is not None and x.dtype == torch.bfloat16 and rule.groups == 1:
        counts = torch.empty(shape, dtype=torch.int32, device=x.device)
        logits = _in_pieces(x, narrow, counts)
        pieces = logits.shape[0]
    else:
        counts = torch.zeros(shape, dtype=torch.int32, device=x.device)
        logits = torch.mm(x.double(), weight.T)
    assert weight.stride(1) == x.stride(1) == 1
    _choose_kernel[(tokens,)](
        logits,
        x,
        weight,
        bias,
        logits if real is None else real,
        ids,
        weights,
        counts,
        tiles.pairs,
        tiles.table,
        tokens,
        x.stride(0),
        weight.stride(0),
        hidden=x.shape[1],
        pieces=pieces,
        margin=_MARGIN,
        exact_piece=min(_EXACT_PIECE, triton.next_power_of_2(x.shape[1])),
        with_padding=real is not None,
        experts=count,
        groups=rule.groups,
        top_groups=rule.top_groups,
        top_k=rule.top_k,
        normalize=rule.normalize,
        scaling=rule.scaling,
        group_lanes=triton.next_power_of_2(rule.groups),
        member_lanes=triton.next_power_of_2(count // rule.groups),
        slot_lanes=triton.next_power_of_2(rule.top_k),
        expert_lanes=triton.next_power_of_2(count),
        block=BLOCK,
        tile_rows=tiles.rows,
        at_once=PAIRS_OF_ONE_WARP,
        sorts=tokens <= SORTED_AT_ONCE,
        num_warps=1,
        **overlap(x.device),
    )
    if tokens > SORTED_AT_ONCE:
        place(ids, counts[:-1].view(blocks, count), tiles)
    return Routing(ids, weights, tiles)


def _in_pieces(x: Tensor, narrow: Tensor, counts: Tensor) -> Tensor:
    """x [T, H] and parts [P, E, H] bf16 -> W x over each PIECE of H, [ceil(H / PIECE), T, E] fp32.
    Sets `counts` [n] int32 to 0 for the launch behind it."""
    assert x.stride(1) == narrow.stride(2) == 1
    parts, experts, hidden = narrow.shape
    tokens = x.shape[0]
    pieces = triton.cdiv(hidden, PIECE)
    out = torch.empty((pieces, tokens, experts), dtype=torch.float32, device=x.device)
    rows = 16 if tokens <= 64 and not is_deterministic() else 64
    _pieces_kernel[(pieces, triton.cdiv(experts, _EXPERTS_AT_ONCE), triton.cdiv(tokens, rows))](
        x,
        narrow,
        out,
        counts,
        counts.numel(),
        tokens,
        experts,
        x.stride(0),
        narrow.stride(0),
        narrow.stride(1),
        hidden=hidden,
        parts=parts,
        piece=PIECE,
        tile_experts=_EXPERTS_AT_ONCE,
        tile_rows=rows,
        num_warps=4,
        **overlap(x.device),
    )
    return out


@triton.jit
def _pieces_kernel(
    x,
    narrow,
    out,
    counts,
    num_counts,
    tokens,
    experts,
    x_stride,
    part_stride,
    expert_stride,
    hidden: tl.constexpr,
    parts: tl.constexpr,
    piece: tl.constexpr,
    tile_experts: tl.constexpr,
    tile_rows: tl.constexpr,
    waits: tl.constexpr,
):
    """A program per (piece of H, tile of experts, tile of tokens): its product, the smallest part
    of the weight first. The first program sets the counts to 0."""
    wait(waits)
    if tl.program_id(0) + tl.program_id(1) + tl.program_id(2) == 0:
        start = 0
        while start < num_counts:
            at = start + tl.arange(0, 128)
            tl.store(counts + at, tl.zeros([128], tl.int32), mask=at < num_counts)
            start += 128
    lane = tl.program_id(0) * piece + tl.arange(0, piece)
    expert = tl.program_id(1) * tile_experts + tl.arange(0, tile_experts)
    token = tl.program_id(2) * tile_rows + tl.arange(0, tile_rows)
    inside = lane < hidden
    rows = x + token.to(tl.int64)[None, :] * x_stride + lane[:, None]
    right = tl.load(rows, mask=(token < tokens)[None, :] & inside[:, None], other=0.0)
    held = (expert < experts)[:, None] & inside[None, :]
    left = narrow + expert[:, None] * expert_stride + lane[None, :]
    total = tl.zeros([tile_experts, tile_rows], tl.float32)
    for index in tl.static_range(parts):
        part = parts - 1 - index
        total = tl.dot(tl.load(left + part * part_stride, mask=held, other=0.0), right, total)
    offset = (tl.program_id(0) * tokens + token).to(tl.int64)[None, :] * experts + expert[:, None]
    tl.store(out + offset, total, mask=(token < tokens)[None, :] & (expert < experts)[:, None])


@triton.jit
def _exact_score(x, weight, hidden: tl.constexpr, piece: tl.constexpr):
    """sigmoid(w x) in fp64 of an expert's row `weight` [H] and a token `x` [H]."""
    total = tl.zeros([piece], tl.float64)
    for start in range(0, hidden, piece):
        lane = start + tl.arange(0, piece)
        values = tl.load(x + lane, mask=lane < hidden, other=0.0).to(tl.float64)
        total += values * tl.load(weight + lane, mask=lane < hidden, other=0.0)
    return 1.0 / (1.0 + tl.exp(-tl.sum(total, axis=0)))


@triton.jit
def _choose_kernel(
    logits,
    x,
    router,
    bias,
    real_tokens,
    ids,
    weights,
    counts,
    pairs,
    table,
    tokens,
    x_stride,
    router_stride,
    hidden: tl.constexpr,
    pieces: tl.constexpr,
    margin: tl.constexpr,
    exact_piece: tl.constexpr,
    with_padding: tl.constexpr,
    experts: tl.constexpr,
    groups: tl.constexpr,
    top_groups: tl.constexpr,
    top_k: tl.constexpr,
    normalize: tl.constexpr,
    scaling: tl.constexpr,
    group_lanes: tl.constexpr,
    member_lanes: tl.constexpr,
    slot_lanes: tl.constexpr,
    expert_lanes: tl.constexpr,
    block: tl.constexpr,
    tile_rows: tl.constexpr,
    at_once: tl.constexpr,
    sorts: tl.constexpr,
    waits: tl.constexpr,
):
    """A program per token: `pieces` > 0 are summed here, else `logits` [T, E] are in fp64. Counts
    its choices and, if `sorts`, the last program places the pairs of all tokens, one block."""
    wait(waits)
    token = tl.program_id(0).to(tl.int64)
    size: tl.constexpr = experts // groups
    group = tl.arange(0, group_lanes)
    member = tl.arange(0, member_lanes)[None, :]
    expert = group[:, None] * size + member
    real = (group[:, None] < groups) & (member < size)
    if pieces == 0:
        logit = tl.load(logits + token * experts + expert, mask=real, other=0.0)
    else:
        logit = tl.zeros([group_lanes, member_lanes], tl.float64)
        # Unrolled, so that the loads of all pieces overlap.
        for index in tl.static_range(pieces):
            offset = logits + (index * tokens + token) * experts + expert
            logit += tl.load(offset, mask=real, other=0.0).to(tl.float64)
    score = 1.0 / (1.0 + tl.exp(-logit))
    expert_bias = tl.load(bias + expert, mask=real, other=0.0).to(tl.float64)
    choice = score + expert_bias
    # As in a sort, NaN is above all numbers; left alone it would equal no maximum.
    choice = tl.where(choice != choice, float("inf"), choice)
    choice = tl.where(real, choice, -float("inf"))

    if groups > 1:
        total = tl.max(choice, axis=1)
        if size > 1:
            best = tl.where(choice == total[:, None], member, member_lanes)
            first = tl.min(best, axis=1)
            total += tl.max(tl.where(member == first[:, None], -float("inf"), choice), axis=1)
        open_groups = group < groups
        for _ in range(top_groups):
            highest = tl.max(tl.where(open_groups, total, -float("inf")), axis=0)
            taken = tl.min(tl.where(open_groups & (total == highest), group, group_lanes), axis=0)
            open_groups = open_groups & (group != taken)
        # Experts of the other groups have choice score 0, as the model was trained.
        choice = tl.where(open_groups[:, None] & real, 0.0, choice)

    if pieces > 0:
        # The border of the choice: the k-th largest score, equal scores counted one by one.
        left = real
        border = tl.full([], float("inf"), tl.float64)
        for _ in range(top_k):
            border = tl.max(tl.where(left, choice, -float("inf")))
            last = tl.min(tl.where(left & (choice == border), expert, experts))
            left = left & (expert != last)
        unsure = real & (tl.abs(choice - border) <= margin)
        if tl.sum(unsure.to(tl.int32)) > 1:
            while tl.sum(unsure.to(tl.int32)) > 0:
                again = tl.min(tl.where(unsure, expert, experts))
                router_row = router + again.to(tl.int64) * router_stride
                exact = _exact_score(x + token * x_stride, router_row, hidden, exact_piece)
                score = tl.where(expert == again, exact, score)
                choice = tl.where(expert == again, exact + expert_bias, choice)
                unsure = unsure & (expert != again)

    open_experts = real
    slots = tl.arange(0, slot_lanes)
    chosen = tl.zeros([slot_lanes], tl.int64)
    weight = tl.zeros([slot_lanes], tl.float64)
    for slot in range(top_k):
        highest = tl.max(tl.where(open_experts, choice, -float("inf")))
        taken = tl.min(tl.where(open_experts & (choice == highest), expert, experts))
        open_experts = open_experts & (expert != taken)
        chosen = tl.where(slots == slot, taken.to(tl.int64), chosen)
        # Lanes that are not real may have the number of an expert of the next group.
        taken_score = tl.sum(tl.where(real & (expert == taken), score, 0.0))
        weight = tl.where(slots == slot, taken_score, weight)
    if normalize:
        weight = weight / (tl.sum(weight, axis=0) + 1e-20)
    if with_padding:
        chosen = tl.where(tl.load(real_tokens + token), chosen, -1)
    offset = token * top_k + slots
    tl.store(ids + offset, chosen, mask=slots < top_k)
    tl.store(weights + offset, (weight * scaling).to(tl.float32), mask=slots < top_k)
    # Sums of whole numbers are the same in any order.
    counted = (slots < top_k) & (chosen >= 0)
    own = counts + (token // block) * experts
    tl.atomic_add(own + chosen, tl.full([slot_lanes], 1, tl.int32), mask=counted, sem="relaxed")
    if sorts:
        # Every thread's writes come before the mark of this program, which the last one reads.
        tl.debug_barrier()
        ended = counts + tl.cdiv(tokens, block) * experts
        if tl.atomic_add(ended, 1, sem="acq_rel") == tokens - 1:
            tl.debug_barrier()
            place_block(
                ids,
                counts,
                pairs,
                table,
                0,
                tokens * top_k,
                1,
                experts,
                expert_lanes,
                block * top_k,
                tile_rows,
                at_once,
                1,
            )
