"""A row of the context engine, the tokens drawn for it, and the blocks they make."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from torch import Tensor

from twotower.towers.decoding.draft_policy import DraftPolicy
from twotower.towers.decoding.lookup import LookupIndex
from twotower.towers.decoding.sampling import Drawn
from twotower.towers.decoding.services import Block, DraftCosts, NextDraft, Token
from twotower.towers.engine.engine import EngineRow

T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")


def token_of(drawn: Drawn, index: int) -> Token:
    """The token at an index of a draw."""
    top = drawn.top_log_probs[index] if drawn.top_log_probs else None
    return Token(drawn.token_ids[index], drawn.confidences[index], drawn.log_probs[index], top)


class RowDrafts:
    """A row's tokens, indexed for lookups, and the policy of its rounds. `asked` is the draft that
    the denoiser was asked for last, at `costs`."""

    def __init__(self, tokens: Sequence[int], policy: DraftPolicy) -> None:
        self.index = LookupIndex(tokens)
        self.policy = policy
        self.asked: NextDraft = ""
        self.costs = DraftCosts()

    def take(self, tokens: Sequence[int], accepted: int) -> None:
        """Takes the new tokens of a draft of the denoiser that was checked."""
        self.index.extend(tokens)
        if self.asked:
            self.policy.learn_draft(self.asked, accepted, self.costs)


@dataclass(eq=False)
class ContextRow(EngineRow):
    """A row of the context engine.

    `token` is what the tower drew for the state's position, None before; `committed` tells whether
    the output has it already, and until then `hidden` is the hidden state [H] that it was drawn
    from. `mirrored` is where the denoiser's mirror stands: 0 as long as it holds nothing, and while
    it is not known whether an update has arrived. `key` is the prefix cache's key of what was read,
    `cached_to` the tokens of the last entry. `turn` is held by the call that works on the state.
    `drafts` are those of a row whose rounds the tower makes alone.
    """

    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    token: Token | None = None
    committed: bool = False
    mirrored: int = 0
    hidden: Tensor | None = None
    key: bytes = b""
    cached_to: int = 0
    drafts: RowDrafts | None = None


_Call = Callable[Concatenate[T, ContextRow, P], Coroutine[Any, Any, R]]


def in_turn(call: _Call[T, P, R]) -> _Call[T, P, R]:
    """Makes a row's call wait until no other call works on the row's state."""

    @wraps(call)
    async def alone(engine: T, row: ContextRow, /, *args: P.args, **kwargs: P.kwargs) -> R:
        async with row.turn:
            return await call(engine, row, *args, **kwargs)

    return alone


def block_of(
    start: int,
    tokens: Sequence[Token],
    steps: tuple[int, ...],
    *,
    context_passes: int,
    accepted: int = 0,
    drafted: int = 0,
) -> Block:
    """A block of tokens of the context tower, which took no denoiser passes here."""
    return Block(
        start,
        tuple(token.token_id for token in tokens),
        steps,
        tuple(token.confidence for token in tokens),
        nfe=0,
        context_passes=context_passes,
        log_probs=tuple(token.log_prob for token in tokens),
        accepted_tokens=accepted,
        drafted_tokens=drafted,
        top_log_probs=tuple(token.top for token in tokens if token.top is not None),
    )
