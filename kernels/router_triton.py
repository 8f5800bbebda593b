# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The router of moe.py on a GPU: torch's fp64 product, then a program per token for the choice."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower.kernels.moe import RouterRule


def route(
    x: Tensor, weight: Tensor, bias: Tensor, rule: RouterRule, real: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x [T, H], weight [E, H] fp64, bias [E] -> expert ids [T, k] int64 and weights [T, k] fp32.

    All in fp64, equal choice scores to the lower expert id; tokens that are not `real` [T] bool get
    no expert, -1. The product is torch's, which may sum
    in another order for another T: choices can differ where scores agree to about 1e-15.
    """
    tokens, count = x.shape[0], weight.shape[0]
    ids = torch.empty(tokens, rule.top_k, dtype=torch.int64, device=x.device)
    weights = torch.empty(tokens, rule.top_k, dtype=torch.float32, device=x.device)
    if tokens == 0:
        return ids, weights
    logits = torch.mm(x.double(), weight.T)
    _choose_kernel[(tokens,)](
        logits,
        bias,
        logits if real is None else real,
        ids,
        weights,
        logits.stride(0),
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
        num_warps=1,
    )
    return ids, weights


@triton.jit
def _choose_kernel(
    logits,
    bias,
    real_tokens,
    ids,
    weights,
    logits_stride,
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
):
    token = tl.program_id(0).to(tl.int64)
    size: tl.constexpr = experts // groups
    group = tl.arange(0, group_lanes)
    member = tl.arange(0, member_lanes)[None, :]
    expert = group[:, None] * size + member
    real = (group[:, None] < groups) & (member < size)
    logit = tl.load(logits + token * logits_stride + expert, mask=real, other=0.0)
    score = 1.0 / (1.0 + tl.exp(-logit))
    choice = score + tl.load(bias + expert, mask=real, other=0.0).to(tl.float64)
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
        # An expert of a lost group counts as 0, as the model was trained.
        choice = tl.where(open_groups[:, None] & real, 0.0, choice)

    open_experts = real
    slots = tl.arange(0, slot_lanes)
    chosen = tl.zeros([slot_lanes], tl.int64)
    weight = tl.zeros([slot_lanes], tl.float64)
    for slot in range(top_k):
        highest = tl.max(tl.where(open_experts, choice, -float("inf")))
        taken = tl.min(tl.where(open_experts & (choice == highest), expert, experts))
        open_experts = open_experts & (expert != taken)
        chosen = tl.where(slots == slot, taken.to(tl.int64), chosen)
        # Lanes that are not real may bear the next group's numbers.
        own = tl.sum(tl.where(real & (expert == taken), score, 0.0))
        weight = tl.where(slots == slot, own, weight)
    if normalize:
        weight = weight / (tl.sum(weight, axis=0) + 1e-20)
    if with_padding:
        chosen = tl.where(tl.load(real_tokens + token), chosen, -1)
    place = token * top_k + slots
    tl.store(ids + place, chosen, mask=slots < top_k)
    tl.store(weights + place, (weight * scaling).to(tl.float32), mask=slots < top_k)
