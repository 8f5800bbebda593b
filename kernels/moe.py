"""Mixture of experts: sigmoid router with a choice bias and expert groups, relu^2 experts.

    s = sigmoid(W x) in fp64;  choice by s + bias, weights from s alone
    out = sum over chosen e of w_e down_e(relu(up_e x)^2)

Sources: Liu et al. 2024 (DeepSeek-V3), section 2.1.2, for router, bias and groups; So et al.
2021 (Primer) for relu^2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.kernels.elementwise import relu_squared, sigmoid
from twotower.kernels.linear import linear, linear_tiled
from twotower.kernels.quantized import QuantizedExperts, quantize_tokens, widen

# A matrix per expert: a list of (packed) matrices [N, K], a tensor [E, N, K], or 8-bit values.
ExpertWeights = Sequence[Tensor] | Tensor | QuantizedExperts

_MOST_PARTS = 3


@dataclass(frozen=True)
class RouterRule:
    """Rule by which a token's experts are chosen: `top_k` of them, from the best `top_groups` of
    `groups` groups. `normalize` divides their weights by the sum, `scaling` multiplies them."""

    top_k: int
    groups: int
    top_groups: int
    normalize: bool
    scaling: float


class Routing(NamedTuple):
    """The experts of T tokens: `ids` [T, k] int64, -1 for none, and `scores` [T, k] fp32. `tiles`
    is the kernels' own: the same choices sorted for their products."""

    ids: Tensor
    scores: Tensor
    tiles: Any = None


@dataclass(frozen=True)
class SlotOutputs:
    """What a token's k experts and the shared MLP give before they are added: `by_slot`
    [T, k + parts, H], the shared parts last, of which those without an expert are not written, and
    the token's `ids` and `scores` [T, k]."""

    by_slot: Tensor
    ids: Tensor
    scores: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """T and H of the sum."""
        return self.by_slot.shape[0], self.by_slot.shape[2]

    def sum(self) -> Tensor:
        """The sum [T, H], in fp32 in the order of the slots, rounded once."""
        slots = self.ids.shape[1]
        chosen = (self.ids >= 0).unsqueeze(-1)
        written = torch.where(chosen, self.by_slot[:, :slots], 0.0)
        total = _weighted_sum(written, torch.where(chosen[..., 0], self.scores, 0.0))
        for part in range(slots, self.by_slot.shape[1]):
            total = total + self.by_slot[:, part].float()
        return total.to(self.by_slot.dtype)


def narrow_parts(weight: Tensor) -> Tensor | None:
    """weight [E, H] fp64 -> the fewest bf16 parts [P, E, H] that add up to it exactly, the largest
    first: P = 1 for a weight stored in bf16, 3 for fp32. None if three are not enough."""
    parts, rest = [], weight
    for _ in range(_MOST_PARTS):
        parts.append(rest.bfloat16())
        rest = rest - parts[-1].double()
        if not bool(rest.any()):
            return torch.stack(parts)
    return None


def route(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    rule: RouterRule,
    real: Tensor | None = None,
    narrow: Tensor | None = None,  # noqa: ARG001
) -> Routing:
    """x [T, H], weight [E, H] fp64, bias [E] -> expert ids [T, k] int64 and weights [T, k] fp32.

    All arithmetic is fp64; of equal choice scores the lower expert id wins. Tokens that are not
    `real` [T] bool get no expert, id -1. `narrow` is the kernel's (`narrow_parts`) and not read
    here.
    """
    scores = sigmoid(linear_tiled(x.double(), weight))
    choice = scores + bias.double()
    if rule.groups > 1:
        choice = _keep_best_groups(choice, rule)
    ids = torch.sort(choice, dim=-1, descending=True, stable=True).indices[:, : rule.top_k]
    weights = scores.gather(1, ids)
    if rule.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    if real is not None:
        ids = ids.masked_fill(~real[:, None], -1)
    return Routing(ids, (weights * rule.scaling).float())


def slot_outputs(
    x: Tensor,
    routing: Routing,
    up: ExpertWeights,
    down: ExpertWeights,
    shared_up: Tensor,
    shared_down: Tensor,
) -> Tensor | SlotOutputs:
    """As `experts`, whose sum a kernel leaves to the norm that reads it."""
    return experts(x, routing.ids, routing.scores, up, down, shared_up, shared_down)


def experts(
    x: Tensor,
    ids: Tensor,
    scores: Tensor,
    up: ExpertWeights,
    down: ExpertWeights,
    shared_up: Tensor,
    shared_down: Tensor,
) -> Tensor:
    """x [T, H], ids and scores [T, k], up E x [F, H], down E x [H, F], shared MLP [Fs, H] and
    [H, Fs] -> [T, H] in x's dtype: the chosen experts, weighted by `scores`, plus the shared MLP.

    Only experts that some token chose are read; id -1 is no expert. A token's k results are added
    in the order of its slots, in fp32, so that the sum does not depend on the other tokens.
    Experts in 8 bits say themselves how they are multiplied (`QuantizedExperts.products`); the
    shared MLP is always multiplied in x's dtype.
    """
    return _routed(x, ids, scores, up, down) + mlp(x, shared_up, shared_down)


def _routed(
    x: Tensor, ids: Tensor, scores: Tensor, up: ExpertWeights, down: ExpertWeights
) -> Tensor:
    """The routed experts' part of `experts`: tokens are sorted by expert, one product each."""
    tokens, slots = ids.shape
    if tokens == 1 and int(ids.min()) >= 0:
        results = [_expert(x, up, down, expert) for expert in ids[0].tolist()]
        return _weighted_sum(torch.stack(results, dim=1), scores).to(x.dtype)
    flat = ids.flatten()
    order = torch.sort(flat, stable=True).indices
    counts = torch.bincount(flat + 1, minlength=len(up) + 1).tolist()
    gathered = x.index_select(0, order // slots)
    outputs = [gathered.new_zeros(counts[0], x.shape[1])]
    start = counts[0]
    for expert, count in enumerate(counts[1:]):
        if count:
            outputs.append(_expert(gathered[start : start + count], up, down, expert))
            start += count
    by_slot = torch.empty_like(gathered).index_copy_(0, order, torch.cat(outputs))
    return _weighted_sum(by_slot.view(tokens, slots, -1), scores).to(x.dtype)


def _expert(x: Tensor, up: ExpertWeights, down: ExpertWeights, expert: int) -> Tensor:
    """The product of x [n, H] with one expert, [n, H]; 8-bit weights multiply in fp32."""
    if isinstance(up, QuantizedExperts) and isinstance(down, QuantizedExperts):
        if up.products == "fp8":
            inner = relu_squared(_fp8_product(x, up, expert)).to(x.dtype)
            return _fp8_product(inner, down, expert).to(x.dtype)
        return mlp(x.float(), up[expert], down[expert]).to(x.dtype)
    return mlp(x, up[expert], down[expert])


def _fp8_product(x: Tensor, weights: QuantizedExperts, expert: int) -> Tensor:
    """x [n, K], quantized by token, times one expert's matrix [N, K] -> [n, N] fp32.

    fp32 holds the product of two 8-bit values exactly, so that widened ones give what 8-bit
    products with sums in fp32 give, but for the order of the sum.
    """
    values, scale = quantize_tokens(x)
    total = linear(widen(values), widen(weights.values[expert]))
    return total * weights.scale[expert] * scale.unsqueeze(1)


def mlp(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """x [T, H], up [F, H], down [H, F], biases [F] and [H] -> down(relu(up x)^2), [T, H]."""
    return linear(relu_squared(linear(x, up, up_bias)), down, down_bias)


def _weighted_sum(by_slot: Tensor, weights: Tensor) -> Tensor:
    """by_slot [T, k, H], weights [T, k] -> their sum over k, slot by slot, [T, H] fp32."""
    wide = by_slot.float()
    total = wide[:, 0] * weights[:, 0:1]
    for slot in range(1, weights.shape[1]):
        total.addcmul_(wide[:, slot], weights[:, slot : slot + 1])
    return total


def _keep_best_groups(choice: Tensor, rule: RouterRule) -> Tensor:
    """choice [T, E] -> the same with 0 for experts outside the best groups, as the model was
    trained. A group's score is the sum of its two best experts'."""
    grouped = choice.unflatten(-1, (rule.groups, -1))
    best_two = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
    kept = torch.sort(best_two, dim=-1, descending=True, stable=True).indices[:, : rule.top_groups]
    mask = F.one_hot(kept, rule.groups).sum(1).bool()
    kept_only: Tensor = grouped.masked_fill(~mask.unsqueeze(-1), 0.0)
    return kept_only.flatten(1)
