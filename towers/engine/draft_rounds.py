"""Rounds of a row that the context tower makes alone: steps, and drafts from lookups.

They need neither the denoiser nor a link, so they run inside the engine, several to a call: a
round costs a pass and nothing between processes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace

from twotower.towers.decoding.draft_policy import DraftExperience, policy_of
from twotower.towers.decoding.pass_times import PassTimes
from twotower.towers.decoding.sampling import Draw, Sampler
from twotower.towers.decoding.services import Block, DraftCosts, NextDraft, Token
from twotower.towers.engine.context_row import ContextRow, RowDrafts, block_of, token_of
from twotower.towers.engine.context_work import ContextResult, ContextWork
from twotower.towers.engine.engine import state_of
from twotower.towers.request.params import GenerationParams

Submit = Callable[[ContextWork], Awaitable[ContextResult]]


@dataclass
class _Gained:
    """Tokens that rounds have given, the round of each, and counts."""

    tokens: list[Token] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    passes: int = 0
    drafted: int = 0
    accepted: int = 0

    def add(self, tokens: Sequence[Token]) -> None:
        self.tokens += tokens
        self.rounds += [self.passes] * len(tokens)

    @property
    def ids(self) -> list[int]:
        return [token.token_id for token in self.tokens]


class DraftRounds:
    """Makes rounds of rows of a context tower. `submit` runs a piece of work in a pass;
    `with_denoiser`: states of rows can be sent to a denoiser."""

    def __init__(self, submit: Submit, *, with_denoiser: bool) -> None:
        self.times = PassTimes()
        self._experience = DraftExperience()
        self._submit = submit
        self._with_denoiser = with_denoiser

    def begin(self, tokens: Sequence[int], params: GenerationParams) -> RowDrafts:
        """Starts the rounds of a row of which `tokens` are known, the one at the end of the output
        included."""
        how = policy_of(params, self.times, self._experience, with_denoiser=self._with_denoiser)
        return RowDrafts(tokens, how)

    async def decode(
        self,
        row: ContextRow,
        drafts: RowDrafts,
        count: int,
        params: GenerationParams,
        output: Sequence[int],
        costs: DraftCosts,
    ) -> Block:
        """At least `count` tokens, unless the output ends or a draft of the denoiser pays."""
        state, gained, sampler = state_of(row.state), _Gained(), Sampler.from_params(params)
        assert row.token is not None, "prefill comes first"
        start = state.position + row.committed
        if not row.committed:
            # The token that was drawn with the prompt's last logits.
            row.committed = True
            gained.add([row.token])
            drafts.index.extend([row.token.token_id])
        drafts.asked, drafts.costs = "", costs
        while len(gained.tokens) < count and params.eos_token_id not in gained.ids:
            match = drafts.index.match()
            room = min(params.block_size, state.capacity - state.position) - 1
            length = 0 if match is None else match.length
            chosen = drafts.policy.choose(length, room, costs)
            if chosen.asks:
                drafts.asked = chosen.asks
                break
            draft: list[int] = []
            if match is not None and chosen.count:
                draft = drafts.index.draft(match, chosen.count)
            fresh = await self._round(row, draft, sampler, [*output, *gained.ids])
            drafts.index.extend([token.token_id for token in fresh])
            drafts.policy.learn(length, len(draft), len(fresh) - 1)
            gained.add(fresh)
            gained.passes += 1
            gained.drafted += len(draft)
            gained.accepted += len(fresh) - 1
        return _block(start, gained, drafts.asked)

    async def _round(
        self,
        row: ContextRow,
        draft: Sequence[int],
        sampler: Sampler,
        output: Sequence[int],
    ) -> list[Token]:
        """Reads the last token and a draft of those after it; returns what the tower has drawn:
        the accepted tokens and one more."""
        state = state_of(row.state)
        assert row.token is not None
        read = [row.token.token_id, *draft]
        draw = draw_along(sampler, state.position, read, 1, output)
        work = ContextWork(state, read, advance=not draft, draw=draw, accepts=bool(draft))
        result = await self._submit(work)
        drawn = result.drawn
        assert drawn is not None
        fresh = [token_of(drawn, index) for index in range(result.accepted + 1)]
        row.token = fresh[-1]
        return fresh


def draw_along(
    sampler: Sampler,
    start: int,
    draft: Sequence[int],
    known: int,
    output: Sequence[int],
    first: int = 1,
) -> Draw:
    """The tower's own draws along a draft that begins at position `start`: after its first `first`
    tokens, and after each more. The first `known` are committed already, as the last of `output`;
    penalties count the others too."""
    ends = range(first, len(draft) + 1)
    draw = Draw(sampler, range(start + first, start + len(draft) + 1))
    if sampler.penalizes:
        draw = replace(draw, output=output, drafted=[draft[known:end] for end in ends])
    return draw


def _block(start: int, gained: _Gained, asked: NextDraft) -> Block:
    block = block_of(
        start,
        gained.tokens,
        tuple(gained.rounds),
        context_passes=gained.passes,
        accepted=gained.accepted,
        drafted=gained.drafted,
    )
    return replace(
        block,
        lookup_accepted_tokens=gained.accepted,
        lookup_drafted_tokens=gained.drafted,
        drafted_by="lookup" if gained.drafted else "",
        next_draft=asked,
    )
