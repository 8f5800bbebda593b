"""Blocks of a completion with their text, drafts of them, and its cost."""

from __future__ import annotations

from dataclasses import dataclass

# The most probable tokens at a position with their natural log-probabilities, the best first.
TopLogProbs = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class TextBlock:
    """A committed block; `commit_steps` and `confidences` are each token's denoising step and
    probability.

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

    `cached_tokens` of the prompt came from the prefix cache; in verified, `accepted_tokens` of
    `drafted_tokens` were accepted.
    """

    prompt_tokens: int
    completion_tokens: int
    nfe: int
    context_passes: int
    cached_tokens: int
    accepted_tokens: int
    drafted_tokens: int

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
        )
