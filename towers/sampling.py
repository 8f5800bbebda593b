"""How a token is drawn from logits: temperature, filters, keyed noise.

Temperature, top-k, top-p and min-p apply in this order. Noise is keyed by the row, the absolute
position and the step, so a draw repeats exactly in any batch and after any resume.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.kernels import dispatch
from twotower.kernels.philox import uniforms
from twotower.kernels.unmask import bar
from twotower.towers.errors import NumericalError
from twotower.towers.params import GenerationParams, row_key

DOMAIN_DENOISE = 1
DOMAIN_AUTOREGRESSIVE = 2


@dataclass(frozen=True)
class Drawn:
    """One token per position, with its probability (untempered, unfiltered) and the natural log
    of that."""

    token_ids: list[int]
    confidences: list[float]
    log_probs: list[float]


@dataclass(frozen=True)
class Sampler:
    """The draw of one row: greedy if `temperature` is 0; no EOS below position `eos_from`."""

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    key: int
    eos_token_id: int | None = None
    eos_from: int = 0

    @classmethod
    def from_params(cls, params: GenerationParams) -> Sampler:
        """`params` must have a seed."""
        assert params.seed is not None
        return cls(
            params.temperature,
            params.top_k,
            params.top_p,
            params.min_p,
            row_key(params.seed),
            params.eos_token_id,
            params.eos_from,
        )

    def draw(
        self,
        logits: Tensor,
        positions: list[int],
        step: int,
        domain: int,
        excluded_token: int | None = None,
    ) -> Drawn:
        """logits [M, V] at M absolute positions -> a token at each.

        Raises NumericalError on non-finite logits.
        """
        barred = self._barred(positions, logits.device)
        scores = noise = None
        if self.temperature > 0:
            scores = draw_scores(logits, self, excluded_token, barred)
            where = torch.tensor(positions, device=logits.device)
            noise = uniforms(self.key, where, step, domain, logits.shape[-1])
        tokens, confidences, log_probs, finite = dispatch.predict(
            logits, excluded_token, scores, noise, self.eos_token_id, barred
        )
        if not bool(finite.all()):
            raise NumericalError(f"non-finite logits at position {positions[0]}, step {step}")
        return Drawn(tokens.tolist(), confidences.tolist(), log_probs.tolist())

    def _barred(self, positions: list[int], device: torch.device) -> Tensor | None:
        """Where EOS cannot be drawn, [M] bool; None if it can be everywhere."""
        if self.eos_token_id is None or min(positions, default=self.eos_from) >= self.eos_from:
            return None
        return torch.tensor([position < self.eos_from for position in positions], device=device)


def draw_scores(
    logits: Tensor, sampler: Sampler, excluded_token: int | None, barred: Tensor | None = None
) -> Tensor:
    """logits [M, V] -> log-probabilities to draw from, -inf where filtered out, [M, V] fp32.

    Where `barred` [M] bool is True, EOS is taken out before the filters count what is left.
    """
    scores = logits.float()
    if excluded_token is not None:
        scores = scores.clone()
        scores[:, excluded_token] = float("-inf")
    scores = bar(scores, sampler.eos_token_id, barred)
    # From the maximum down, so that no quotient overflows at a temperature next to 0.
    scores = scores - scores.amax(-1, keepdim=True)
    temperature = max(sampler.temperature, torch.finfo(scores.dtype).tiny)
    scores = torch.log_softmax(scores / temperature, dim=-1)
    if sampler.top_k is not None:
        scores = _keep_top_k(scores, sampler.top_k)
    if sampler.top_p is not None and sampler.top_p < 1.0:
        scores = _keep_top_p(scores, sampler.top_p)
    if sampler.min_p is not None:
        least = scores.amax(-1, keepdim=True) + torch.log(torch.tensor(sampler.min_p))
        scores = scores.masked_fill(scores < least, float("-inf"))
    return scores


def _keep_top_k(scores: Tensor, top_k: int) -> Tensor:
    """Keeps the k largest and everything equal to the k-th."""
    kth = scores.topk(min(top_k, scores.shape[-1]), dim=-1).values[:, -1:]
    kept = scores.masked_fill(scores < kth, float("-inf"))
    return torch.log_softmax(kept, dim=-1)


def _keep_top_p(scores: Tensor, top_p: float) -> Tensor:
    """Drops a token once the mass of those before it exceeds p; the one that crosses p stays."""
    ordered, index = torch.sort(scores, dim=-1, descending=True, stable=True)
    mass = torch.exp(ordered)
    before = torch.cumsum(mass, dim=-1) - mass
    dropped = torch.zeros_like(before, dtype=torch.bool).scatter_(1, index, before > top_p)
    return torch.log_softmax(scores.masked_fill(dropped, float("-inf")), dim=-1)
