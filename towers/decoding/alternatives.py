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
    count = min(count, logits.shape[-1])
    # By hand, as topk promises nothing about equals, and a stable sort of all tokens is slow.
    least = logits.topk(count, dim=-1).values[:, -1:]
    above, equal = logits > least, logits == least
    room = count - above.sum(-1, keepdim=True)
    kept = above | (equal & (equal.cumsum(-1) <= room))
    ids = kept.nonzero()[:, 1].unflatten(0, (-1, count))
    values, order = logits.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    log_probs = values - torch.logsumexp(logits, dim=-1, keepdim=True)
    lines = zip(ids.gather(1, order).tolist(), log_probs.tolist(), strict=True)
    return [_finite(*line) for line in lines]


def _finite(ids: list[int], log_probs: list[float]) -> TopLogProbs:
    """Pairs of a line, without tokens that take no part."""
    pairs = zip(ids, log_probs, strict=True)
    return tuple(pair for pair in pairs if pair[1] > float("-inf"))
