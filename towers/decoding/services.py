"""Protocols of the two towers, and the values that their calls give.

`generation.py` drives a row through a `ContextService` and a `DenoiserService`; it passes ids of
rows and never tensors. In one process the services are the engines themselves; in a deployment
they are handles of two actors. Between the towers a `StateLink` carries state.

Guarantees that every implementation gives:
- a row exists on a side from `open` until `release`; `release` of an unknown row does nothing;
- `open` waits, in order, until the row has its slot and pages;
- the caller makes one call for a row at a time, except that `denoise_block` and `next_token` may be
  called while `extend` runs; calls for different rows may overlap freely;
- after `prefill`, `extend` or `verify` returns, the state up to that position has been handed to
  the link in order; a call of the denoiser waits until its mirror has that state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from twotower.towers.request.params import FinishReason, GenerationParams


@dataclass(frozen=True)
class Block:
    """Tokens that were committed together, with step and probability of each.

    `commit_steps[i]` is the 0-based step at which position i was committed, `confidences[i]` the
    probability that the tower gave token i then and `log_probs[i]` its natural logarithm: the
    denoiser's in mask_diffusion and mock_ar, the context tower's in ar and verified. `start` is
    the absolute position of the first token, `nfe` the number of denoiser calls and
    `context_passes` that of context passes spent since the block before it. In verified,
    `drafted_tokens` were checked and `accepted_tokens` of them accepted. `cached_tokens` of the
    prompt came from the prefix cache (0 after the first block). `eased` is the share of the way to
    its floors that the row is served with (GenerationParams.eased).
    """

    start: int
    token_ids: tuple[int, ...]
    commit_steps: tuple[int, ...]
    confidences: tuple[float, ...]
    nfe: int
    context_passes: int = 0
    finish_reason: FinishReason | None = None
    log_probs: tuple[float, ...] = ()
    accepted_tokens: int = 0
    drafted_tokens: int = 0
    cached_tokens: int = 0
    eased: float = 0.0

    def first(self, count: int) -> Block:
        """The block with its first `count` tokens only; counts of passes and drafts stay."""
        return replace(
            self,
            token_ids=self.token_ids[:count],
            commit_steps=self.commit_steps[:count],
            confidences=self.confidences[:count],
            log_probs=self.log_probs[:count],
        )


@dataclass(frozen=True)
class Prefilled:
    """Passes that read a row, and tokens of it that came from the prefix cache."""

    passes: int
    cached_tokens: int = 0


class ContextService(Protocol):
    """A context tower holding rows."""

    async def open(self, row_id: str, capacity: int) -> int:
        """Waits for room for a row of up to `capacity` tokens; returns how many others still wait.

        Raises CapacityError if too many wait already or the row can never fit.
        """

    async def prefill(
        self, row_id: str, prompt: Sequence[int], generated: Sequence[int], params: GenerationParams
    ) -> Prefilled:
        """Reads a prompt and, on a resume, what was already generated."""

    async def extend(self, row_id: str, token_ids: Sequence[int]) -> int:
        """Appends committed tokens to the row's context; returns passes made."""

    async def decode(self, row_id: str, count: int, params: GenerationParams) -> Block:
        """Decodes up to `count` tokens autoregressively; stops after an EOS."""

    async def verify(self, row_id: str, draft: Sequence[int], params: GenerationParams) -> Block:
        """Checks a draft by one pass over it and appends what it accepts to the row's context.

        The block holds the accepted tokens that are new and the token that the tower draws after
        them, which is the first of the next draft.
        """

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probabilities of tokens 1..n-1, each given the tokens before it."""

    async def release(self, row_id: str) -> None:
        """Frees everything that the row holds, or its place in the queue."""


class DenoiserService(Protocol):
    """A denoiser tower holding mirrors of rows' context states."""

    async def open(self, row_id: str, capacity: int) -> None:
        """Waits for room for the mirror of a row of up to `capacity` tokens; as ContextService."""

    async def denoise_block(
        self,
        row_id: str,
        position: int,
        params: GenerationParams,
        known: Sequence[int] = (),
    ) -> Block:
        """Fills the block that starts at `position`, once the mirror has reached it.

        `known` tokens at its head are committed already. In verified mode the block is a draft.
        """

    async def next_token(
        self, row_id: str, position: int, last_token: int, params: GenerationParams
    ) -> Block:
        """mock_ar: the token at `position`, from the context before `last_token`."""

    async def release(self, row_id: str) -> None:
        """Frees everything that the row holds, or its place in the queue."""
