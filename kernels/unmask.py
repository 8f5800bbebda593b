"""From a denoiser's logits to a token and a confidence per position.

    predicted = argmax of logits, or of the filtered draw scores + Gumbel noise
    confidence = softmax(logits)[predicted], untempered and unfiltered, the mask token left out

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
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [M, V] -> token ids [M] int64, confidences [M] fp32, finite [M] bool.

    `excluded_token` can never be predicted and takes no part in the softmax. With `draw_scores`
    (log-probabilities to draw from, -inf where filtered out) and `uniform` [M, V] in (0, 1), the
    token is drawn. A row with any non-finite logit has `finite` False and no meaningful token.
    """
    wide = logits.float()
    finite = torch.isfinite(wide).all(-1)
    if excluded_token is not None:
        wide = wide.clone()
        wide[:, excluded_token] = float("-inf")
    if draw_scores is None:
        tokens = first_argmax(wide)
    else:
        assert uniform is not None
        noise = -torch.log(-torch.log(uniform.clamp_min(_SMALLEST_UNIFORM)))
        tokens = first_argmax(draw_scores + noise)
    chosen = wide.gather(1, tokens.unsqueeze(1)).squeeze(1)
    confidences = torch.exp(chosen - torch.logsumexp(wide, dim=-1))
    return tokens, confidences, finite


def first_argmax(scores: Tensor) -> Tensor:
    """scores [M, V] -> the lowest index that holds each row's maximum, [M] int64."""
    best = scores.amax(-1, keepdim=True)
    index = torch.arange(scores.shape[-1], device=scores.device)
    return torch.where(scores == best, index, scores.shape[-1] - 1).amin(-1)
