"""What the model class asks of a model, in this process or behind a service, and what it gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

from twotower.towers.request.params import GenerationParams


@dataclass(frozen=True)
class Asked:
    """A completion to write: ids of the prompt, and parameters with a seed."""

    prompt: Sequence[int]
    params: GenerationParams


@dataclass(frozen=True)
class Written:
    """The text of a completion without its stop string, and what it cost: tokens, denoiser passes
    and passes of the context tower."""

    text: str
    tokens: int
    nfe: int
    context_passes: int


@dataclass(frozen=True)
class Scored:
    """Of a row's tokens 1..n-1 the natural-log probability, and the most probable token there."""

    log_probs: Sequence[float]
    best: Sequence[int]


@dataclass(frozen=True)
class Pair:
    """A continuation to judge after a context of at least one token."""

    context: Sequence[int]
    continuation: Sequence[int]


@dataclass(frozen=True)
class Likelihood:
    """The natural-log probability of a continuation, or a bound of it; `is_greedy` says that each
    of its tokens was the most probable one. `nfe` are denoiser passes over the row."""

    log_prob: float
    is_greedy: bool
    nfe: int = 0


@dataclass
class Spent:
    """What an evaluation has cost so far. Passes count a row's part in each: rows share them.

    `nfe` and `context_passes` are those of completions, `scored_tokens` the tokens whose
    probability was asked for and `scored_nfe` the denoiser passes that took. `cut_prompts` were
    too long for the model and lost their beginning.
    """

    completions: int = 0
    tokens: int = 0
    nfe: int = 0
    context_passes: int = 0
    scored_texts: int = 0
    scored_tokens: int = 0
    scored_nfe: int = 0
    cut_prompts: int = 0

    def add_written(self, written: Written) -> None:
        """Counts a completion."""
        self.completions += 1
        self.tokens += written.tokens
        self.nfe += written.nfe
        self.context_passes += written.context_passes

    def add_likelihood(self, pair: Pair, likelihood: Likelihood) -> None:
        """Counts a continuation."""
        self.scored_texts += 1
        self.scored_tokens += len(pair.continuation)
        self.scored_nfe += likelihood.nfe

    def report(self) -> dict[str, Any]:
        """All counters, tokens per denoiser pass and per pass of either tower; None without any.
        Passes that read the prompts are among the context tower's."""
        passes = self.nfe + self.context_passes
        return {
            **asdict(self),
            "tokens_per_nfe": round(self.tokens / self.nfe, 4) if self.nfe else None,
            "tokens_per_pass": round(self.tokens / passes, 4) if passes else None,
        }


class Backend(Protocol):
    """A model that writes and scores many rows at once; each gets what it gets alone.

    `max_context` are the most tokens of a row. All methods raise TwoTowerError.
    """

    name: str
    max_context: int
    eos_token_id: int | None

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with the special tokens that the tokenizer puts around one."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""

    def write(self, asked: Sequence[Asked]) -> list[Written]:
        """The completions, one for each that is asked."""

    def score(self, rows: Sequence[Sequence[int]]) -> list[Scored]:
        """Scores of the context tower, one for each row of at least two ids."""

    def close(self) -> None:
        """Gives back what the backend holds."""


@runtime_checkable
class Bounding(Protocol):
    """A Backend that can also judge with the denoiser."""

    def bound(self, pairs: Sequence[Pair], samples: int, block_size: int) -> list[Likelihood]:
        """The denoiser's bound of each pair; see `denoiser_likelihood`. Raises TwoTowerError."""
