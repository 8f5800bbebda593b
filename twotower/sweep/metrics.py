"""Figures of a point: pure functions of the rows that it decoded.

Every interval is a bootstrap over prompts: 95 % of the resampled figures lie in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

GRAM = 4
# An output of ar that repeats more of its 4-grams than this loops.
FRESH = 0.5
_RESAMPLES = 1000
_LOW, _HIGH = 2.5, 97.5

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Row:
    """The output of one prompt.

    `log_probs` are the context tower's natural-log probabilities of its tokens, whatever decoded
    them, and `best_log_probs` those of the most probable token at each position, after the tokens
    that the output has there. `nfe` counts denoiser passes, `context_passes` those of the context
    tower without the ones that read the prompt. Of the drafted and accepted tokens those of lookups
    are also counted by themselves. `scores` are a task's, by name.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    log_probs: tuple[float, ...]
    nfe: int
    context_passes: int
    accepted_tokens: int = 0
    drafted_tokens: int = 0
    scores: dict[str, float] = field(default_factory=dict)
    best_log_probs: tuple[float, ...] = ()
    lookup_accepted_tokens: int = 0
    lookup_drafted_tokens: int = 0


def repeats(token_ids: Sequence[int], length: int = GRAM) -> list[bool]:
    """Whether each token completes `length` tokens that stand earlier in the same output; the
    first ones complete none."""
    seen: set[tuple[int, ...]] = set()
    found = []
    for end in range(1, len(token_ids) + 1):
        gram = tuple(token_ids[end - length : end]) if end >= length else None
        found.append(gram is not None and gram in seen)
        if gram is not None:
            seen.add(gram)
    return found


def equal_tokens(first: Sequence[int], second: Sequence[int]) -> tuple[int, int]:
    """Positions at which two outputs have the same token, and the length of the shorter."""
    pairs = list(zip(first, second, strict=False))
    return sum(one == other for one, other in pairs), len(pairs)


def figures(
    rows: Sequence[Row], reference: Sequence[Row], baseline: Sequence[Row]
) -> dict[str, Any]:
    """All figures of a point that follow from its tokens.

    `reference` are the rows of greedy ar, with which tokens are compared; `baseline` those of ar at
    the point's temperature, with which log-probabilities are.
    """
    return {
        "rows": len(rows),
        "tokens": sum(len(row.token_ids) for row in rows),
        "stopped_share": _mean([row.finish_reason == "stop" for row in rows]),
        **_likelihood(rows, baseline),
        "regret": _regret(rows),
        **_agreement(rows, reference),
        "repeated_share": _repeated(rows),
        **_costs(rows),
        **_fresh(rows, baseline),
        **{f"score_{name}": _mean([row.scores[name] for row in rows]) for name in rows[0].scores},
    }


def interval(
    statistic: Callable[[npt.NDArray[np.int64]], float], count: int
) -> tuple[float, float]:
    """95 % of `statistic` of resampled indices of `count` prompts lie between these two."""
    generator = np.random.default_rng(0)
    drawn = [statistic(generator.integers(0, count, count)) for _ in range(_RESAMPLES)]
    low, high = np.nanpercentile(drawn, [_LOW, _HIGH])
    return float(low), float(high)


def ratio(above: Floats, below: Floats) -> Callable[[npt.NDArray[np.int64]], float]:
    """The sum of one amount over the sum of another, of the prompts that are given by index."""
    return lambda chosen: float(above[chosen].sum() / max(1.0, below[chosen].sum()))


def _likelihood(rows: Sequence[Row], baseline: Sequence[Row]) -> dict[str, float]:
    """Mean log-probabilities a token, and what they lose against the baseline's."""
    own, tokens = _sums(rows)
    theirs, their_tokens = _sums(baseline)
    every = np.arange(len(rows))
    mean, their_mean = ratio(own, tokens), ratio(theirs, their_tokens)

    def loss(chosen: npt.NDArray[np.int64]) -> float:
        return their_mean(chosen) - mean(chosen)

    low, high = interval(mean, len(rows))
    loss_low, loss_high = interval(loss, len(rows))
    return {
        "log_prob": mean(every),
        "log_prob_low": low,
        "log_prob_high": high,
        "loss": loss(every),
        "loss_low": loss_low,
        "loss_high": loss_high,
        # The same as a share: of the geometric mean of the tokens' probabilities.
        "relative_quality": math.exp(-loss(every)),
        "novel_loss": _novel(baseline) - _novel(rows),
    }


def _sums(rows: Sequence[Row]) -> tuple[Floats, Floats]:
    """By prompt, the sum of log-probabilities and the number of tokens."""
    sums = np.array([math.fsum(row.log_probs) for row in rows])
    return sums, np.array([float(len(row.log_probs)) for row in rows])


def _novel(rows: Sequence[Row]) -> float:
    """Mean log-probability of tokens that do not repeat: a loop is likely, and no achievement."""
    values = [
        value
        for row in rows
        for value, repeated in zip(row.log_probs, repeats(row.token_ids), strict=True)
        if not repeated
    ]
    return math.fsum(values) / max(1, len(values))


def _regret(rows: Sequence[Row]) -> float | None:
    """What a token's log-probability lacks of the most probable one's, after the output's own
    tokens: the mean over all tokens. None where the most probable ones are not known."""
    pairs = [pair for row in rows for pair in zip(row.best_log_probs, row.log_probs, strict=False)]
    if not pairs:
        return None
    # The last bit of the same token's may differ.
    return math.fsum(max(0.0, best - own) for best, own in pairs) / len(pairs)


def _fresh(rows: Sequence[Row], baseline: Sequence[Row]) -> dict[str, float | int | None]:
    """The rows of prompts whose ar output does not loop: a loop is easy to guess."""
    fresh = [row for row, ar in zip(rows, baseline, strict=True) if _repeated([ar]) <= FRESH]
    speed = _costs(fresh)["tokens_per_pass"] if fresh else None
    return {"fresh_rows": len(fresh), "fresh_tokens_per_pass": speed}


def _agreement(rows: Sequence[Row], reference: Sequence[Row]) -> dict[str, float]:
    pairs = [
        equal_tokens(row.token_ids, other.token_ids)
        for row, other in zip(rows, reference, strict=True)
    ]
    equal, compared = np.array(pairs, dtype=np.float64).T
    share = ratio(equal, compared)
    low, high = interval(share, len(rows))
    exact = [row.token_ids == other.token_ids for row, other in zip(rows, reference, strict=True)]
    return {
        "agreement": share(np.arange(len(rows))),
        "agreement_low": low,
        "agreement_high": high,
        "exact_share": _mean(exact),
    }


def _repeated(rows: Sequence[Row]) -> float:
    """Share of all 4-grams of the outputs that stand earlier in the same output."""
    count = sum(sum(repeats(row.token_ids)) for row in rows)
    return count / max(1, sum(max(0, len(row.token_ids) - GRAM + 1) for row in rows))


def _costs(rows: Sequence[Row]) -> dict[str, float | int | None]:
    tokens = sum(len(row.token_ids) for row in rows)
    nfe = sum(row.nfe for row in rows)
    context = sum(row.context_passes for row in rows)
    return {
        "nfe": nfe,
        "context_passes": context,
        "accepted_tokens": sum(row.accepted_tokens for row in rows),
        "drafted_tokens": sum(row.drafted_tokens for row in rows),
        "lookup_accepted_tokens": sum(row.lookup_accepted_tokens for row in rows),
        "lookup_drafted_tokens": sum(row.lookup_drafted_tokens for row in rows),
        "tokens_per_nfe": tokens / nfe if nfe else None,
        "tokens_per_pass": tokens / max(1, nfe + context),
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
