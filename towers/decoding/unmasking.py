"""Unmasks a block on the host: chooses the positions that each step commits.

A block starts as all masks (or with some positions committed). Each step the denoiser predicts
every masked position, and a rule chooses those that are committed, at least enough to be done
within the number of steps. A committed token never changes. The rules `released`, `leftmost`,
`product` and `leading` are defined in kernels/commit.py, where many blocks take a step at once on a
device; both choose the same positions, bit for bit.
Source: the decoding loop released with Nemotron-Labs-TwoTower; fast-dLLM's threshold rule, Wu et
al. 2025, section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from twotower.towers.decoding.services import TopLogProbs

CommitName = Literal["released", "leftmost", "product", "leading"]


def _above(confidences: Sequence[float], threshold: float) -> list[int]:
    return [i for i, confidence in enumerate(confidences) if confidence > threshold]


def _above_or_leftmost(confidences: Sequence[float], threshold: float) -> list[int]:
    return _above(confidences, threshold) or [0]


def _leading_run(confidences: Sequence[float], threshold: float) -> list[int]:
    # Rounded to fp32 after each factor, as on a device.
    products = np.multiply.accumulate(np.asarray(confidences, dtype=np.float32))
    run = (i for i, product in enumerate(products.tolist()) if not product > threshold)
    return list(range(max(1, next(run, len(confidences)))))


# What each rule takes whatever the number of steps: indices, from the left.
_FIRST: Mapping[CommitName, Callable[[Sequence[float], float], list[int]]] = {
    "released": _above,
    "leftmost": _above_or_leftmost,
    "product": _leading_run,
    "leading": _leading_run,
}


@dataclass(frozen=True)
class ThresholdRule:
    """Commits the positions that the rule `name` takes at a threshold, and then the most confident
    of the others, until there are enough to be done within the steps."""

    threshold: float
    steps_per_block: int
    name: CommitName = "released"

    def chosen(self, confidences: Sequence[float], step: int) -> list[int]:
        """Confidences of the masked positions, from the left, at step `step` -> indices of those
        that are committed, the first first: those of the rule before others, then the more
        confident, of equals the leftmost."""
        masked = len(confidences)
        left = self.steps_per_block - step
        if left <= 1:
            return _by_confidence(confidences, masked)
        first = set(_FIRST[self.name](confidences, self.threshold))
        fair = 0 if self.name == "leading" else -(-masked // left)
        order = sorted(range(masked), key=lambda i: (i not in first, -confidences[i]))
        return order[: max(len(first), fair)]


@dataclass(frozen=True)
class ReplayRule:
    """A recorded schedule: how many tokens each step committed. For benchmarks."""

    schedule: tuple[int, ...]

    def chosen(self, confidences: Sequence[float], step: int) -> list[int]:
        """As ThresholdRule.chosen: the most confident; a schedule that has run out commits the
        rest."""
        known = step < len(self.schedule)
        return _by_confidence(confidences, self.schedule[step] if known else len(confidences))


CommitRule = ThresholdRule | ReplayRule


def _by_confidence(confidences: Sequence[float], count: int) -> list[int]:
    return sorted(range(len(confidences)), key=lambda i: -confidences[i])[:count]


class BlockDraft:
    """A block that is being unmasked, in plain lists without tensors.

    `known` tokens at its head are committed from the start, at step 0 with certainty.
    """

    def __init__(
        self, length: int, mask_token_id: int, rule: CommitRule, known: Sequence[int] = ()
    ) -> None:
        masked = length - len(known)
        self.token_ids = [*known, *[mask_token_id] * masked]
        self.masked = list(range(len(known), length))
        self.commit_steps = [*[0] * len(known), *[-1] * masked]
        self.confidences = [*[1.0] * len(known), *[0.0] * masked]
        self.log_probs = [0.0] * length
        self.top_log_probs: list[TopLogProbs] = []
        self.step = 0
        self._rule = rule

    @property
    def done(self) -> bool:
        """True if no position is masked."""
        return not self.masked

    @property
    def timestep(self) -> float:
        """The masked fraction, the denoiser's t."""
        return len(self.masked) / len(self.token_ids)

    def is_committed(self, index: int) -> bool:
        """True if the position has its token for good."""
        return self.commit_steps[index] >= 0

    def commit(
        self,
        tokens: Sequence[int],
        confidences: Sequence[float],
        log_probs: Sequence[float] = (),
        top_log_probs: Sequence[TopLogProbs] = (),
    ) -> list[int]:
        """Takes predictions for the masked positions, in order; returns the positions committed.

        `log_probs` and the most probable tokens are stored beside them.
        """
        if top_log_probs and not self.top_log_probs:
            self.top_log_probs = [()] * len(self.token_ids)
        ranked = self._rule.chosen(confidences, self.step)
        positions = [self.masked[i] for i in ranked]
        for i, position in zip(ranked, positions, strict=True):
            self.token_ids[position] = tokens[i]
            self.commit_steps[position] = self.step
            self.confidences[position] = confidences[i]
            if log_probs:
                self.log_probs[position] = log_probs[i]
            if top_log_probs:
                self.top_log_probs[position] = top_log_probs[i]
        self.masked = [position for position in self.masked if self.commit_steps[position] < 0]
        self.step += 1
        return positions
