"""Unmasks a block on the host: chooses the positions that each step commits.

A block starts as all masks (or with some positions committed). Each step the denoiser predicts
every masked position; those above the confidence threshold are committed, at least enough to be
done within the number of steps, the most confident first. A committed token never changes.
Source: the decoding loop released with Nemotron-Labs-TwoTower; fast-dLLM's threshold rule, Wu et
al. 2025, section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from twotower.towers.decoding.services import TopLogProbs


@dataclass(frozen=True)
class ThresholdRule:
    """Commits all positions above the threshold, at least one, and enough to be done within the
    steps."""

    threshold: float
    steps_per_block: int

    def count(self, confidences: Sequence[float], step: int) -> int:
        """Confidences of the masked positions at step `step` -> how many of them to commit."""
        masked = len(confidences)
        remaining = self.steps_per_block - step
        if remaining <= 1:
            return masked
        confident = sum(confidence > self.threshold for confidence in confidences)
        return min(masked, max(confident, 1, -(-masked // remaining)))


@dataclass(frozen=True)
class ReplayRule:
    """A recorded schedule: how many tokens each step committed. For benchmarks."""

    schedule: tuple[int, ...]

    def count(self, confidences: Sequence[float], step: int) -> int:
        """As ThresholdRule.count; a schedule that runs out commits the rest."""
        if step >= len(self.schedule):
            return len(confidences)
        return min(len(confidences), self.schedule[step])


CommitRule = ThresholdRule | ReplayRule


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

        Of equal confidences the leftmost comes first. `log_probs` and the most probable tokens are
        stored beside them.
        """
        if top_log_probs and not self.top_log_probs:
            self.top_log_probs = [()] * len(self.token_ids)
        count = self._rule.count(confidences, self.step)
        ranked = sorted(range(len(self.masked)), key=lambda i: -confidences[i])[:count]
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
