"""A completion as its caller gets it, whether from a service or from towers in this process."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TextBlock:
    """A committed block: number `index` of the completion, whose first token has the absolute
    position `start`.

    `text` is what the block makes certain of the text, without end-of-text token and stop string.
    Per token there are the 0-based denoising step at which it was committed, the probability that
    the tower gave it and the natural logarithm of that; a service sends the logarithms only if they
    were asked for.
    """

    index: int
    start: int
    token_ids: tuple[int, ...]
    text: str
    commit_steps: tuple[int, ...]
    confidences: tuple[float, ...]
    log_probs: tuple[float, ...]


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
        """This stream's cost with that of the `earlier` streams that it has resumed."""
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
