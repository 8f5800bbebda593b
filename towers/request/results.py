"""Blocks of a completion with their text, drafts of them, and its cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# The most probable tokens at a position with their natural log-probabilities, the best first.
TopLogProbs = tuple[tuple[int, float], ...]


# Who drafted tokens that the context tower has checked; empty where nobody has.
DraftedBy = Literal["", "lookup", "denoiser"]


@dataclass(frozen=True)
class TextBlock:
    """A committed block; `commit_steps` and `confidences` are each token's denoising step and
    probability, `drafted_by` tells who drafted it.

    `index` counts the blocks of a stream from 0, `start` is the absolute position of the first
    token. `text` is what these tokens settle of the output's text, without EOS and stop string;
    empty without a tokenizer. `log_probs` are the natural logs of the probabilities; a service
    sends them if they were asked for. `top_log_probs` are at each token the most probable tokens
    with their log-probabilities, as many as were asked for.
    """

    index: int
    start: int
    token_ids: tuple[int, ...]
    text: str
    commit_steps: tuple[int, ...]
    confidences: tuple[float, ...]
    log_probs: tuple[float, ...]
    top_log_probs: tuple[TopLogProbs, ...] = ()
    drafted_by: DraftedBy = ""


@dataclass(frozen=True)
class ProvisionalBlock:
    """The draft of the block at `start` after denoiser step `step`, counted from 0.

    `masked[i]` says that position i is not committed yet. There `token_ids` and `confidences` have
    what that step predicted, or the mask token and 0.0 where the device has kept it. Nothing of it
    is output: a block may be shorter than its drafts, and in verified other than the last of them.
    """

    start: int
    step: int
    token_ids: tuple[int, ...]
    masked: tuple[bool, ...]
    confidences: tuple[float, ...]


@dataclass(frozen=True)
class Usage:
    """Cost of a completion: tokens, denoiser passes (`nfe`) and context tower passes.

    `cached_tokens` of the prompt came from the prefix cache. In verified and auto,
    `accepted_tokens` of `drafted_tokens` were accepted; of lookups `lookup_accepted_tokens` of
    `lookup_drafted_tokens`.
    """

    prompt_tokens: int
    completion_tokens: int
    nfe: int
    context_passes: int
    cached_tokens: int
    accepted_tokens: int
    drafted_tokens: int
    lookup_accepted_tokens: int = 0
    lookup_drafted_tokens: int = 0

    def after(self, earlier: Usage | None) -> Usage:
        """The cost of this stream together with that of the streams before it, which it resumes."""
        if earlier is None:
            return self
        return Usage(
            self.prompt_tokens,
            self.completion_tokens,
            self.nfe + earlier.nfe,
            self.context_passes + earlier.context_passes,
            earlier.cached_tokens,
            self.accepted_tokens + earlier.accepted_tokens,
            self.drafted_tokens + earlier.drafted_tokens,
            self.lookup_accepted_tokens + earlier.lookup_accepted_tokens,
            self.lookup_drafted_tokens + earlier.lookup_drafted_tokens,
        )
