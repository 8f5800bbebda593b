"""Predicts a token, its confidence and its log-probability for every line of logits.

    predicted = argmax of logits, or of logits / temperature + Gumbel noise
    confidence = softmax(logits)[predicted], untempered and unfiltered, the mask token left out
    log-probability = its natural log

Of equal scores the lowest token id wins. Noise is keyed by the line's row, position and step alone.
Source of the Gumbel-max draw: Maddison et al. 2014, section 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.kernels.philox import uniforms

_SMALLEST_UNIFORM = 1e-10


@dataclass(frozen=True)
class SamplingBatch:
    """Sampling parameters of M lines of logits; all [M], int64 but for `temperature`.

    `temperature` fp32, 0 is greedy. Noise has the Philox `key` of the row and a counter of
    absolute `position`, `step` and `domain`. The token `excluded` is left out of the softmax and
    never predicted, `barred` is in the softmax but never predicted; -1 is no token.
    """

    temperature: Tensor
    key: Tensor
    position: Tensor
    step: Tensor
    domain: Tensor
    excluded: Tensor
    barred: Tensor


def predict(
    logits: Tensor, batch: SamplingBatch, draw_scores: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits [M, V] -> token ids [M] int64, confidences and log-probabilities [M] fp32, finite [M].

    `draw_scores` [M, V] fp32 (log-probabilities to draw from, -inf where filtered out) replace
    logits / temperature in the choice; lines at temperature 0 take them without noise. A line with
    any non-finite logit has `finite` False and no meaningful token.
    """
    wide = logits.float()
    # A line's extremes tell: NaN is both. Comparing every logit takes longer than the rest.
    finite = torch.isfinite(wide.amax(-1)) & torch.isfinite(wide.amin(-1))
    wide = without(wide, batch.excluded)
    scores = wide if draw_scores is None else without(draw_scores, batch.excluded)
    scores = without(scores, batch.barred)
    drawn = batch.temperature > 0
    if bool(drawn.any()):
        noise = gumbel(
            uniforms(batch.key, batch.position, batch.step, batch.domain, wide.shape[-1])
        )
        clean = scores if draw_scores is not None else tempered(scores, batch.temperature)
        scores = torch.where(drawn[:, None], clean + noise, scores)
    tokens = first_argmax(scores)
    chosen = wide.gather(1, tokens.unsqueeze(1)).squeeze(1)
    log_probs = chosen - torch.logsumexp(wide, dim=-1)
    return tokens, torch.exp(log_probs), log_probs, finite


def tempered(logits: Tensor, temperature: Tensor) -> Tensor:
    """logits [M, V] fp32, temperature [M] fp32 -> log_softmax(logits / temperature), [M, V]."""
    # From the maximum down, so that no quotient overflows at a temperature next to 0.
    scores = logits - logits.amax(-1, keepdim=True)
    least = torch.finfo(scores.dtype).tiny
    return torch.log_softmax(scores / temperature.clamp_min(least)[:, None], dim=-1)


def without(scores: Tensor, tokens: Tensor) -> Tensor:
    """scores [M, V], tokens [M] int64 -> scores with -inf at each line's token; -1 is no token."""
    rows = (tokens >= 0).nonzero().squeeze(1)
    if not len(rows):
        return scores
    scores = scores.clone()
    scores[rows, tokens[rows]] = float("-inf")
    return scores


def first_argmax(scores: Tensor) -> Tensor:
    """scores [M, V] -> the lowest index of each line's maximum, [M] int64."""
    # Of equal values torch takes the first, on any device.
    return scores.argmax(-1)


def gumbel(uniform: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) -> standard Gumbel noise of the same shape."""
    return -torch.log(-torch.log(uniform.clamp_min(_SMALLEST_UNIFORM)))
