"""From a denoiser's logits to a token and a confidence per position.

    predicted = argmax of logits, or of the filtered draw scores + Gumbel noise
    confidence = softmax(logits)[predicted], untempered and unfiltered, the mask token left out
    log-probability = its natural log

Ties go to the lowest token id. Source of the Gumbel-max draw: Maddison et al. 2014, section 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SMALLEST_UNIFORM = 1e-10


def predict(
    logits: Tensor,
    excluded_token: int | None,
    draw_scores: Tensor | None = None,
    uniform: Tensor | None = None,
    barred_token: int | None = None,
    barred: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits [M, V] -> token ids [M] int64, confidences and log-probabilities [M] fp32, finite [M].

    `excluded_token` can never be predicted and takes no part in the softmax; `barred_token` takes
    part in it, but cannot be predicted where `barred` [M] bool is True. With `draw_scores`
    (log-probabilities to draw from, -inf where filtered out) and `uniform` [M, V] in (0, 1), the
    token is drawn. A row with any non-finite logit has `finite` False and no meaningful token.
    """
    wide = logits.float()
    finite = torch.isfinite(wide).all(-1)
    if excluded_token is not None:
        wide = wide.clone()
        wide[:, excluded_token] = float("-inf")
    scores = wide
    if draw_scores is not None:
        assert uniform is not None
        noise = -torch.log(-torch.log(uniform.clamp_min(_SMALLEST_UNIFORM)))
        scores = draw_scores + noise
    tokens = first_argmax(bar(scores, barred_token, barred))
    chosen = wide.gather(1, tokens.unsqueeze(1)).squeeze(1)
    log_probs = chosen - torch.logsumexp(wide, dim=-1)
    return tokens, torch.exp(log_probs), log_probs, finite


def bar(scores: Tensor, token: int | None, rows: Tensor | None) -> Tensor:
    """scores [M, V] -> the same with -inf at `token` in the rows [M] bool that are True."""
    if token is None or rows is None:
        return scores
    scores = scores.clone()
    scores[:, token] = scores[:, token].masked_fill(rows, float("-inf"))
    return scores


def first_argmax(scores: Tensor) -> Tensor:
    """scores [M, V] -> the lowest index that holds each row's maximum, [M] int64."""
    best = scores.amax(-1, keepdim=True)
    index = torch.arange(scores.shape[-1], device=scores.device)
    return torch.where(scores == best, index, scores.shape[-1] - 1).amin(-1)
