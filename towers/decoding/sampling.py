"""Draws tokens from logits: bias, penalties, temperature, filters, keyed noise.

Bias and penalties, temperature, top-k, top-p and min-p apply in this order. Noise is keyed by the
row, the absolute position and the step, so a draw repeats exactly in any batch and after any
resume.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from twotower.kernels import dispatch
from twotower.kernels.philox import uniforms
from twotower.kernels.unmask import SamplingBatch, gumbel, tempered, without
from twotower.towers.decoding.alternatives import largest, most_probable
from twotower.towers.decoding.services import DraftScores, TopLogProbs
from twotower.towers.errors import NumericalError
from twotower.towers.request.params import GenerationParams, row_key

DOMAIN_DENOISE = 1
DOMAIN_AUTOREGRESSIVE = 2


@dataclass(frozen=True)
class Drawn:
    """One token per position, with its probability (the model's own: without bias, penalties,
    temperature and filters) and the natural log of that; and the most probable tokens there, if
    the sampler asks for them, and the best scores, if the draw does."""

    token_ids: list[int]
    confidences: list[float]
    log_probs: list[float]
    top_log_probs: list[TopLogProbs] = field(default_factory=list)
    draft_scores: DraftScores | None = field(default=None, compare=False)


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
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_logprobs: int = 0

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
            params.presence_penalty,
            params.frequency_penalty,
            params.logit_bias,
            params.top_logprobs,
        )

    @property
    def filtered(self) -> bool:
        """True if top-k, top-p or min-p apply, which need the whole distribution."""
        narrowed = (self.top_k, self.top_p, self.min_p) != (None, None, None)
        return self.temperature > 0 and narrowed

    @property
    def penalizes(self) -> bool:
        """True if scores depend on the tokens of the output."""
        return bool(self.presence_penalty or self.frequency_penalty)

    @property
    def shifted(self) -> bool:
        """True if bias or penalties change the logits to draw from."""
        return self.penalizes or bool(self.logit_bias)

    @property
    def plain(self) -> bool:
        """True if kernels of a GPU make the draw alone, without the host."""
        return not (self.filtered or self.shifted or self.top_logprobs)

    def draw(
        self,
        logits: Tensor,
        positions: Sequence[int],
        step: int,
        domain: int,
        output: Sequence[int] = (),
    ) -> Drawn:
        """logits [M, V] at M absolute positions -> a token at each; penalties count `output`.

        Raises NumericalError on non-finite logits.
        """
        drawn = draw_tokens(logits, [Draw(self, positions, step, domain, output=output)])[0]
        if isinstance(drawn, NumericalError):
            raise drawn
        return drawn


@dataclass(frozen=True)
class Draw:
    """Tokens that a row asks for: one at each of its absolute positions, with noise of a step and
    domain. `excluded_token` can never be drawn and takes no part in the softmax.

    Penalties count the tokens of `output` and, at position i, of `drafted[i]` (none if empty).
    `num_scores` is how many of the best scores to give at each position, the token's own first."""

    sampler: Sampler
    positions: Sequence[int]
    step: int = 0
    domain: int = DOMAIN_AUTOREGRESSIVE
    excluded_token: int | None = None
    output: Sequence[int] = ()
    drafted: Sequence[Sequence[int]] = ()
    num_scores: int = 0

    @property
    def is_shared(self) -> bool:
        """True if it is made from the logits as they are, together with draws of other rows."""
        return not (self.sampler.filtered or self.sampler.shifted or self.num_scores)

    def barred_tokens(self) -> list[int]:
        """At each position EOS while it may not be drawn yet, otherwise -1."""
        eos, start = self.sampler.eos_token_id, self.sampler.eos_from
        if eos is None:
            return [-1] * len(self.positions)
        return [eos if position < start else -1 for position in self.positions]


def draw_tokens(logits: Tensor, draws: Sequence[Draw]) -> list[Drawn | NumericalError]:
    """logits [M, V], the lines of the draws one after another -> the tokens of each draw.

    A draw with non-finite logits gives the error. Draws from the logits as they are share one
    launch.
    """
    ends = list(accumulate(len(draw.positions) for draw in draws))
    spans = [slice(end - len(draw.positions), end) for draw, end in zip(draws, ends, strict=True)]
    shared = [index for index, draw in enumerate(draws) if draw.is_shared]
    results: dict[int, Drawn | NumericalError] = {}
    if len(shared) == len(draws):
        results = dict(enumerate(_predicted(logits, draws, None)))
    elif shared:
        chosen = torch.cat([logits[spans[index]] for index in shared])
        predicted = _predicted(chosen, [draws[index] for index in shared], None)
        results = dict(zip(shared, predicted, strict=True))
    for index, draw in enumerate(draws):
        lines = logits[spans[index]]
        if draw.num_scores:
            results[index] = _with_scores(lines, draw)
            continue
        if index not in results:
            results[index] = _predicted(lines, [draw], draw_scores(lines, draw))[0]
        results[index] = _with_alternatives(results[index], lines, draw)
    return [results[index] for index in range(len(draws))]


@dataclass(frozen=True)
class KeyedScores:
    """What the tokens of M lines are drawn from, [M, V] fp32, with the noise of their draw.

    The token of a line is the argmax of `compared`, of equals the lowest id. `scores` are in the
    same order: log-probability with bias, penalties, temperature and filters, plus the noise,
    -inf where filtered out. They are the same numbers but at temperature 0, where logits are
    compared, which are not normalised, and there is no noise.
    """

    compared: Tensor
    scores: Tensor

    @classmethod
    def of(cls, logits: Tensor, draw: Draw) -> KeyedScores:
        """Those of a draw from logits [M, V], with the bits of `draw_tokens` on a CPU."""
        scores = draw_scores(logits, draw)
        if draw.sampler.temperature == 0:
            return cls(scores, torch.log_softmax(scores, dim=-1))
        batch = sampling_batch([draw], logits.device)
        noise = uniforms(batch.key, batch.position, batch.step, batch.domain, scores.shape[-1])
        scores = scores + gumbel(noise)
        return cls(scores, scores)

    def draw(self, logits: Tensor, draw: Draw) -> Drawn | NumericalError:
        """The tokens, with the probabilities and alternatives that `logits` [M, V] give them."""
        # The noise is in the scores already.
        greedy = replace(draw, sampler=replace(draw.sampler, temperature=0.0))
        return _with_alternatives(_predicted(logits, [greedy], self.compared)[0], logits, draw)


def sampling_batch(draws: Sequence[Draw], device: torch.device) -> SamplingBatch:
    """Key, position, step, temperature and excluded tokens of each line of the draws."""
    counts = [len(draw.positions) for draw in draws]

    def spread(values: Iterable[int]) -> list[int]:
        return [v for v, count in zip(values, counts, strict=True) for _ in range(count)]

    none = [-1 if draw.excluded_token is None else draw.excluded_token for draw in draws]
    whole = torch.tensor(
        [
            spread(signed(draw.sampler.key) for draw in draws),
            [position for draw in draws for position in draw.positions],
            spread(draw.step for draw in draws),
            spread(draw.domain for draw in draws),
            spread(none),
            [token for draw in draws for token in draw.barred_tokens()],
        ],
        dtype=torch.int64,
    ).to(device)
    temperatures = [draw.sampler.temperature for draw in draws for _ in draw.positions]
    return SamplingBatch(torch.tensor(temperatures, dtype=torch.float32).to(device), *whole)


def draw_scores(logits: Tensor, draw: Draw) -> Tensor:
    """logits [M, V] -> log-probabilities to draw from, -inf where filtered out, [M, V] fp32; at
    temperature 0 the logits with bias and penalties.

    A barred token is taken out before the filters count what is left.
    """
    sampler, batch = draw.sampler, sampling_batch([draw], logits.device)
    scores = without(without(logits.float(), batch.excluded), batch.barred)
    if sampler.shifted:
        scores = _shifted(scores, draw)
    if sampler.temperature == 0:
        return scores
    scores = tempered(scores, batch.temperature)
    if sampler.top_k is not None:
        scores = _keep_top_k(scores, sampler.top_k)
    if sampler.top_p is not None and sampler.top_p < 1.0:
        scores = _keep_top_p(scores, sampler.top_p)
    if sampler.min_p is not None:
        least = scores.amax(-1, keepdim=True) + torch.log(torch.tensor(sampler.min_p))
        scores = scores.masked_fill(scores < least, float("-inf"))
    return scores


def _shifted(scores: Tensor, draw: Draw) -> Tensor:
    """scores [M, V] -> those with the row's bias, less its penalties, [M, V]."""
    sampler, device = draw.sampler, scores.device
    scores = scores.clone()
    if sampler.logit_bias:
        tokens, biases = zip(*sampler.logit_bias, strict=True)
        scores[:, torch.tensor(tokens, device=device)] += torch.tensor(biases, device=device)
    if sampler.penalizes:
        counts = _counts(draw, scores)
        scores -= sampler.frequency_penalty * counts
        scores -= sampler.presence_penalty * (counts > 0)
    return scores


def _counts(draw: Draw, scores: Tensor) -> Tensor:
    """How often each token stands in the output before each position, [M, V] fp32 as `scores`."""
    output = torch.tensor(draw.output, dtype=torch.int64, device=scores.device)
    counts = torch.bincount(output, minlength=scores.shape[1]).float().expand_as(scores).clone()
    lines = [line for line, tokens in enumerate(draw.drafted) for _ in tokens]
    if lines:
        tokens = [token for tokens in draw.drafted for token in tokens]
        where = torch.tensor([lines, tokens], device=scores.device)
        one = torch.ones(len(lines), device=scores.device)
        counts.index_put_((where[0], where[1]), one, accumulate=True)
    return counts


def _with_scores(logits: Tensor, draw: Draw) -> Drawn | NumericalError:
    """The tokens of a draw from `logits` [M, V] with their best scores."""
    keyed = KeyedScores.of(logits, draw)
    drawn = keyed.draw(logits, draw)
    if isinstance(drawn, NumericalError):
        return drawn
    ids = largest(keyed.compared, draw.num_scores)
    best = DraftScores(ids.cpu(), keyed.scores.gather(1, ids).cpu())
    return replace(drawn, draft_scores=best)


def _with_alternatives(
    drawn: Drawn | NumericalError, logits: Tensor, draw: Draw
) -> Drawn | NumericalError:
    """The tokens of a draw with the most probable ones of `logits` [M, V], if it asks for them."""
    count = draw.sampler.top_logprobs
    if not count or isinstance(drawn, NumericalError):
        return drawn
    excluded = sampling_batch([draw], logits.device).excluded
    return replace(drawn, top_log_probs=most_probable(without(logits.float(), excluded), count))


def _predicted(
    logits: Tensor, draws: Sequence[Draw], scores: Tensor | None
) -> list[Drawn | NumericalError]:
    parts = dispatch.predict(logits, sampling_batch(draws, logits.device), scores)
    # One transfer; fp64 holds ids and fp32 values exactly.
    tokens, confidences, log_probs, finite = torch.stack([part.double() for part in parts]).tolist()
    results: list[Drawn | NumericalError] = []
    start = 0
    for draw in draws:
        lines = slice(start, start + len(draw.positions))
        start = lines.stop
        if all(finite[lines]):
            ids = [int(token) for token in tokens[lines]]
            results.append(Drawn(ids, confidences[lines], log_probs[lines]))
        else:
            where = f"position {draw.positions[0]}, step {draw.step}"
            results.append(NumericalError(f"non-finite logits at {where}"))
    return results


def signed(key: int) -> int:
    """The same 64 bits as a signed number, for an int64 tensor."""
    return key - (1 << 64) if key >> 63 else key


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
