"""The most probable tokens of a distribution, beside the one that was drawn from it."""

from __future__ import annotations

import torch
from torch import Tensor

from twotower.towers.decoding.services import TopLogProbs


def most_probable(logits: Tensor, count: int) -> list[TopLogProbs]:
    """Finite logits [M, V], -inf where a token takes no part -> each line's `count` most probable
    tokens with their natural log-probabilities, the best first and of equals the lowest id.

    Log-probabilities are those of `kernels.unmask.predict`, bit for bit on a CPU.
    """
    ids = largest(logits, count)
    log_probs = logits.gather(1, ids) - torch.logsumexp(logits, dim=-1, keepdim=True)
    lines = zip(ids.tolist(), log_probs.tolist(), strict=True)
    return [_finite(*line) for line in lines]


def largest(values: Tensor, count: int) -> Tensor:
    """values [M, V] without NaN -> tokens of each line's `count` largest, all if there are fewer,
    [M, K] int64: the largest first, of equals the lowest id."""
    count = min(count, values.shape[-1])
    # By hand, as topk promises nothing about equals, and a stable sort of all tokens is slow.
    least = values.topk(count, dim=-1).values[:, -1:]
    above, equal = values > least, values == least
    room = count - above.sum(-1, keepdim=True)
    kept = above | (equal & (equal.cumsum(-1) <= room))
    ids: Tensor = kept.nonzero()[:, 1].unflatten(0, (-1, count))
    order = values.gather(1, ids).sort(dim=-1, descending=True, stable=True).indices
    return ids.gather(1, order)


def _finite(ids: list[int], log_probs: list[float]) -> TopLogProbs:
    """Pairs of a line, without tokens that take no part."""
    pairs = zip(ids, log_probs, strict=True)
    return tuple(pair for pair in pairs if pair[1] > float("-inf"))
