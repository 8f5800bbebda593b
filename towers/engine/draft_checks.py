"""Checks of the denoiser's drafts by a pass of the context tower."""

from __future__ import annotations

from collections.abc import Sequence

from twotower.towers.decoding.acceptance import MixedDraft
from twotower.towers.decoding.sampling import Sampler
from twotower.towers.decoding.services import Block, DraftScores, Token
from twotower.towers.engine.context_row import ContextRow, block_of, token_of
from twotower.towers.engine.context_work import ContextWork
from twotower.towers.engine.draft_rounds import Submit, draw_along
from twotower.towers.engine.engine import state_of
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.request.params import GenerationParams


class DraftChecks:
    """Checks drafts of rows of a context tower; `submit` runs a piece of work in a pass."""

    def __init__(self, tower: ContextTower, submit: Submit) -> None:
        self._tower = tower
        self._submit = submit

    async def check(
        self,
        row: ContextRow,
        draft: Sequence[int],
        params: GenerationParams,
        output: Sequence[int],
        scores: DraftScores | None,
    ) -> Block:
        """The accepted tokens that are new and the tower's own after them; the row's state has
        taken what was accepted. See `ContextService.verify`."""
        start, known = state_of(row.state).position, int(row.committed)
        if params.mix >= 1 or (scores is not None and params.mix > 0):
            mixed = MixedDraft(draft[known:], scores, params.mix)
            tokens, accepted = await self._accept_mixed(row, draft, params, output, mixed)
        else:
            tokens, accepted = await self._accept_strictly(row, draft, params, output)
        row.token, row.committed, row.hidden = tokens[accepted], True, None
        if row.drafts is not None:
            fresh = [token.token_id for token in tokens[known : accepted + 1]]
            row.drafts.take(fresh, accepted - known)
        return block_of(
            start + known,
            tokens[known : accepted + 1],
            (0,) * (accepted + 1 - known),
            context_passes=1,
            accepted=accepted - known,
            drafted=len(draft) - known,
        )

    async def _accept_strictly(
        self,
        row: ContextRow,
        draft: Sequence[int],
        params: GenerationParams,
        output: Sequence[int],
    ) -> tuple[list[Token], int]:
        """Reads a draft, and what is right of it into the state. Returns the tower's tokens from
        where the state stood, and how many of the draft are the same."""
        state = state_of(row.state)
        assert row.token is not None, "prefill comes first"
        sampler, known = Sampler.from_params(params), int(row.committed)
        draw = draw_along(sampler, state.position, draft, known, output)
        right = draft[0] == row.token.token_id
        work = ContextWork(state, draft, advance=False, draw=draw, accepts=right)
        result = await self._submit(work)
        if not right:
            state.truncate()
        assert result.drawn is not None
        tokens = [row.token, *(token_of(result.drawn, index) for index in range(len(draft)))]
        return tokens, 1 + result.accepted if right else 0

    async def _accept_mixed(
        self,
        row: ContextRow,
        draft: Sequence[int],
        params: GenerationParams,
        output: Sequence[int],
        mixed: MixedDraft,
    ) -> tuple[list[Token], int]:
        """As _accept_strictly, but the tokens are the accepted ones and the tower's own after them.
        A first token that is not committed is checked like the others."""
        state = state_of(row.state)
        assert row.token is not None, "prefill comes first"
        known, before = int(row.committed), row.hidden
        assert known or before is not None, "a token that was drawn has its hidden state"
        sampler = Sampler.from_params(params)
        draw = draw_along(sampler, state.position, draft, known, output, first=known)
        work = ContextWork(
            state, draft, advance=False, draw=draw, mixed=mixed, before=None if known else before
        )
        checked = (await self._submit(work)).checked
        assert checked is not None
        fresh = checked.num_accepted
        self._tower.advance(state, known + fresh)
        state.truncate()
        tokens = [row.token] * known + [token_of(checked.drafted, i) for i in range(fresh)]
        return [*tokens, token_of(checked.own, fresh)], known + fresh
