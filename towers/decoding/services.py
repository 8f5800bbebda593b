"""Protocols of the two towers, and the values that their calls give.

`generation.py` drives a row through a `ContextService` and a `DenoiserService`; it passes ids of
rows and never tensors. In one process the services are the engines themselves; in a deployment
they are handles of two actors. Between the towers a `StateLink` carries state.

Guarantees that every implementation gives:
- a row exists on a side from `open` until `release`; `release` of an unknown row does nothing;
- `open` waits, in order, until the row has its slot and pages;
- the caller makes one call for a row at a time, except that `denoise_block` and `next_token` may be
  called while `extend` runs; calls for different rows may overlap freely;
- after `prefill`, `extend` or `verify` of a row that is mirrored at once
  (`GenerationParams.mirrored_at_once`), and after `update_mirror` of any row, the state up to that
  position has been handed to the link in order; a call of the denoiser waits until its mirror has
  that state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from torch import Tensor

from twotower.towers.request.params import FinishReason, GenerationParams
from twotower.towers.request.results import DraftedBy, ProvisionalBlock, TopLogProbs

__all__ = [
    "UNKNOWN_COSTS",
    "Block",
    "BlockTiming",
    "ContextService",
    "DenoiserService",
    "DraftCosts",
    "DraftScores",
    "Extended",
    "NextDraft",
    "PassTime",
    "Prefilled",
    "ProvisionalBlock",
    "Scores",
    "Token",
    "TopLogProbs",
    "Watcher",
]


@dataclass(frozen=True)
class BlockTiming:
    """When a pair worked on a block: seconds, `begin` of the pair's wall clock.

    `begin` is when work on the block began; for the first block that is when the row was asked to
    open, and `queue_s` and `prefill_s` are what it waited for room and what reading the prompt
    took, both 0 in later blocks. Then the denoiser waited `transfer_s` for its mirror to reach the
    block, and drafting or decoding took `denoise_s` without that. `commit_s` is the pass of the
    context tower over the draft in verified, and in the modes whose tokens are the denoiser's the
    extension by the block before: it overlaps with the others, but is over before a block begins
    whose first token it draws.
    """

    begin: float
    queue_s: float = 0.0
    prefill_s: float = 0.0
    transfer_s: float = 0.0
    denoise_s: float = 0.0
    commit_s: float = 0.0


@dataclass(frozen=True)
class Token:
    """A token that a context tower drew, with its confidence and log-probability, and the most
    probable tokens there if they were asked for."""

    token_id: int
    confidence: float
    log_prob: float
    top: TopLogProbs | None = None


@dataclass(frozen=True)
class PassTime:
    """Seconds that a pass over so many tokens took, of `rows` pieces of work; `prefill_tokens` of
    the tokens were of prompts."""

    seconds: float
    tokens: int
    rows: int
    prefill_tokens: int = 0


@dataclass(frozen=True)
class DraftScores:
    """What the denoiser's draws of n tokens were made from, at each the K best: `token_ids` [n, K]
    int64 and `scores` [n, K] fp32, the largest first, on the CPU.

    A score is what the drawn token is the argmax of: log-probability with bias, penalties,
    temperature, filters and noise.
    """

    token_ids: Tensor
    scores: Tensor


# A draft that the denoiser is asked for: one that the context tower checks, or a block that is
# committed whole; empty for none.
NextDraft = Literal["", "checked", "whole"]


@dataclass(frozen=True)
class DraftCosts:
    """What a draft of the denoiser costs a row now, in seconds, by kind; None: not known."""

    checked: float | None = None
    whole: float | None = None

    def of(self, asked: NextDraft) -> float | None:
        """The cost of a kind of draft."""
        return self.whole if asked == "whole" else self.checked


UNKNOWN_COSTS = DraftCosts()


@dataclass(frozen=True)
class Block:
    """Tokens that were committed together, with step and probability of each.

    `commit_steps[i]` is the 0-based step at which position i was committed, `confidences[i]` the
    probability that the tower gave token i then and `log_probs[i]` its natural logarithm: the
    denoiser's in mask_diffusion and mock_ar, the context tower's in ar and verified, and of a first
    token that it drew in mask_diffusion. `start` is the absolute position of the first token, `nfe`
    the number of denoiser calls and `context_passes` that of context passes spent since the block
    before it. In verified and auto, `drafted_tokens` were checked and `accepted_tokens` of them
    accepted, those of lookups `lookup_drafted_tokens` and `lookup_accepted_tokens`; `drafted_by` is
    who drafted last, and `next_draft` the draft of the denoiser that pays next. `cached_tokens` of
    the prompt came from the prefix cache (0 after the first block). `eased` is the share of the
    way to its floors that the row is served with (GenerationParams.eased). `top_log_probs[i]` are
    the `top_logprobs` most probable tokens of the distribution that `log_probs[i]` is of, of equals
    the lowest id first; it is empty if none were asked for. `draft_scores` are those of the tokens
    of a draft that is not known yet, if its acceptance needs them; `passes` are the passes that the
    block took, as far as they are known. Blocks that differ in these two or in `timing` are equal.
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
    top_log_probs: tuple[TopLogProbs, ...] = ()
    lookup_accepted_tokens: int = 0
    lookup_drafted_tokens: int = 0
    drafted_by: DraftedBy = ""
    next_draft: NextDraft = ""
    draft_scores: DraftScores | None = field(default=None, compare=False)
    passes: tuple[PassTime, ...] = field(default=(), compare=False)
    timing: BlockTiming | None = field(default=None, compare=False)

    @property
    def end(self) -> int:
        """Absolute position after the last token."""
        return self.start + len(self.token_ids)

    def first(self, count: int) -> Block:
        """The block with its first `count` tokens only; counts of passes and drafts stay."""
        return replace(
            self,
            token_ids=self.token_ids[:count],
            commit_steps=self.commit_steps[:count],
            confidences=self.confidences[:count],
            log_probs=self.log_probs[:count],
            top_log_probs=self.top_log_probs[:count],
        )


# Takes the drafts of a block while it is denoised.
Watcher = Callable[[ProvisionalBlock], None]


@dataclass(frozen=True)
class Prefilled:
    """Passes that read a row, tokens of it that came from the prefix cache, and the first token of
    the next block where the context tower draws it."""

    passes: int
    cached_tokens: int = 0
    first: Token | None = None


@dataclass(frozen=True)
class Extended:
    """Passes that read a committed block, and the first token of the next block where the context
    tower draws it."""

    passes: int
    first: Token | None = None


@dataclass(frozen=True)
class Scores:
    """Natural log-probabilities of tokens 1..n-1 of a text, each given the tokens before it, and at
    each the most probable tokens; no list of these if none were asked for."""

    log_probs: list[float]
    top_log_probs: list[TopLogProbs]


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

    async def extend(
        self,
        row_id: str,
        token_ids: Sequence[int],
        params: GenerationParams,
        output: Sequence[int] = (),
    ) -> Extended:
        """Appends committed tokens to the row's context.

        `output`, here and below, are all tokens of the output before the call, here with
        `token_ids`, which penalties count; empty without penalties.
        """

    async def decode(
        self,
        row_id: str,
        count: int,
        params: GenerationParams,
        output: Sequence[int] = (),
        costs: DraftCosts = UNKNOWN_COSTS,
    ) -> Block:
        """Decodes about `count` tokens with the context tower alone; stops after an EOS.

        In ar they are at most `count`, one a pass. In verified and auto a pass checks a draft from
        a lookup, and the last may accept more than `count`; the block ends early, possibly without
        tokens, if a draft of the denoiser pays next, by its `costs`.
        """

    async def update_mirror(self, row_id: str) -> None:
        """Brings the denoiser's mirror of the row to where its context ends."""

    async def verify(
        self,
        row_id: str,
        draft: Sequence[int],
        params: GenerationParams,
        output: Sequence[int] = (),
        scores: DraftScores | None = None,
    ) -> Block:
        """Checks a draft of the denoiser by one pass over it and appends what it accepts to the
        row's context; `scores` are those of its tokens that are not known yet, if `params` ask for
        a mix.

        The block holds the accepted tokens that are new and the token that the tower draws after
        them, which is the first of the next draft.
        """

    async def score(self, token_ids: Sequence[int], top_logprobs: int = 0) -> Scores:
        """Log-probabilities of tokens 1..n-1, and that many of the most probable at each."""

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
        output: Sequence[int] = (),
        watch: Watcher | None = None,
    ) -> Block:
        """Fills the block that starts at `position`, once the mirror has reached it.

        `known` tokens at its head are committed already, and are the last of `output`. In verified
        mode the block is a draft. `watch` is called after every step but the last; a call that is
        made again, after a loss, repeats drafts. The block's timing has the wait for the mirror.
        """

    async def next_token(
        self,
        row_id: str,
        position: int,
        last_token: int,
        params: GenerationParams,
        output: Sequence[int] = (),
    ) -> Block:
        """mock_ar: the token at `position`, from the context before `last_token`."""

    async def release(self, row_id: str) -> None:
        """Frees everything that the row holds, or its place in the queue."""
