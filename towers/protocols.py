"""The seams between the block loop, the two engines and the link between them.

`generation.py` drives a row through a `ContextService` and a `DenoiserService`; it passes names
of rows around and never tensors. In one process the services are the engines themselves; in a
deployment they are handles of two actors. Between the towers a `StateLink` carries state.

Guarantees that every implementation gives:
- a row exists on a side from `open` until `release`; `release` of an unknown row does nothing;
- calls for one row come one at a time, except that `denoise_block` and `next_token` may be
  called while `extend` runs; calls for different rows may overlap freely;
- after `prefill`, `extend` or `decode` returns, the state up to that position has been handed to
  the link in order; `denoise_block` and `next_token` wait until their own side has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from twotower.towers.params import FinishReason, GenerationParams

if TYPE_CHECKING:
    from twotower.towers.state import ContextState


@dataclass(frozen=True)
class Block:
    """Tokens that were committed together, with how each came about.

    `commit_steps[i]` is the 0-based step at which position i was committed, `confidences[i]` the
    probability that the tower gave token i then. `start` is the absolute position of the first
    token, `nfe` the number of denoiser calls and `context_passes` that of context passes spent
    since the block before it.
    """

    start: int
    token_ids: tuple[int, ...]
    commit_steps: tuple[int, ...]
    confidences: tuple[float, ...]
    nfe: int
    context_passes: int = 0
    finish_reason: FinishReason | None = None


class ContextService(Protocol):
    """A context tower holding rows."""

    async def open(self, row_id: str, capacity: int) -> None:
        """Makes room for a row of up to `capacity` tokens. Raises CapacityError."""

    async def prefill(
        self, row_id: str, prompt: Sequence[int], generated: Sequence[int], params: GenerationParams
    ) -> int:
        """Reads a prompt and, on a resume, what was already generated; returns passes made."""

    async def extend(self, row_id: str, token_ids: Sequence[int]) -> int:
        """Appends committed tokens to the row's context; returns passes made."""

    async def decode(self, row_id: str, count: int, params: GenerationParams) -> Block:
        """Decodes up to `count` tokens autoregressively; stops after an EOS."""

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probabilities of tokens 1..n-1, each given the tokens before it."""

    async def release(self, row_id: str) -> None:
        """Frees everything that the row holds."""


class DenoiserService(Protocol):
    """A denoiser tower holding mirrors of rows' context states."""

    async def open(self, row_id: str, capacity: int) -> None:
        """Makes room for the mirror of a row of up to `capacity` tokens. Raises CapacityError."""

    async def denoise_block(self, row_id: str, position: int, params: GenerationParams) -> Block:
        """Fills the block that starts at `position`, once the mirror has reached it."""

    async def next_token(
        self, row_id: str, position: int, last_token: int, params: GenerationParams
    ) -> Block:
        """mock_ar: the token at `position`, from the context before `last_token`."""

    async def release(self, row_id: str) -> None:
        """Frees everything that the row holds."""


class StateLink(Protocol):
    """The way of context states from a context tower to a denoiser tower, in order per row."""

    async def publish(self, row_id: str, state: ContextState, start: int) -> None:
        """Hands over the row's state; K/V before `start` was published before."""
