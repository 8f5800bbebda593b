"""The context tower's engine: prefill, extension, decoding and verification of many rows."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from twotower.towers.decoding.pass_times import PassTimes
from twotower.towers.decoding.sampling import DOMAIN_AUTOREGRESSIVE, Draw, Sampler
from twotower.towers.decoding.services import (
    UNKNOWN_COSTS,
    Block,
    DraftCosts,
    DraftScores,
    Extended,
    Prefilled,
    Scores,
    Token,
)
from twotower.towers.engine.admission import Admission
from twotower.towers.engine.block_log import BlockLog
from twotower.towers.engine.context_blocks import ContextBlocks
from twotower.towers.engine.context_drafts import ContextDrafts
from twotower.towers.engine.context_packed import ContextPacked
from twotower.towers.engine.context_pass import ContextPass
from twotower.towers.engine.context_row import ContextRow, block_of, in_turn, token_of
from twotower.towers.engine.context_steps import ContextSteps
from twotower.towers.engine.context_work import ContextResult, ContextWork
from twotower.towers.engine.cuda_graph import GraphMemory
from twotower.towers.engine.draft_checks import DraftChecks
from twotower.towers.engine.draft_rounds import DraftRounds
from twotower.towers.engine.engine import Engine, state_of
from twotower.towers.engine.options import EngineOptions
from twotower.towers.engine.prefill import KvFeed, prefill_pieces, send_state
from twotower.towers.engine.scoring import logits, score
from twotower.towers.engine.stats import EngineStats
from twotower.towers.engine.turns import Turn
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.request.params import GenerationParams
from twotower.towers.state.link import StateLink, UpdateWriter
from twotower.towers.state.pool import StatePool
from twotower.towers.state.prefix_cache import PrefixCache, chain_keys, next_key
from twotower.towers.state.update import UpdatePlan, plan_update

# Tokens between the block ends that enter the prefix cache: snapshots of a hybrid are large.
CACHE_INTERVAL = 256


class ContextEngine(Engine[ContextRow, ContextWork, ContextResult]):
    """Rows in a context tower. `link` carries their states to a denoiser, if there is one.

    Their states live in `pool` (None: a pool that `options` make for this tower alone).
    `device_steps` (None: on CUDA) runs decode steps over fixed buffers, as CUDA graphs. `turn` is
    the context tower's of `Turns`, where the denoiser's passes run on the same device.
    """

    _admission: Admission

    def __init__(
        self,
        tower: ContextTower,
        link: StateLink | None = None,
        options: EngineOptions | None = None,
        *,
        pool: StatePool | None = None,
        threaded: bool = False,
        device_steps: bool | None = None,
        turn: Turn | None = None,
    ) -> None:
        options, device = options or EngineOptions(), tower.device
        pool = pool or options.pool_for(tower, mirrored=link is not None)
        max_bytes = options.prefix_cache_bytes
        cache = PrefixCache(pool, max_bytes) if max_bytes else None
        reclaim = cache.reclaim if cache else None
        admission = Admission(pool, reclaim, options.max_queued_requests)
        wanted = device.type == "cuda" if device_steps is None else device_steps
        memory, log = GraphMemory(device), BlockLog(tower)
        self._steps = ContextSteps(tower, memory) if wanted else None
        self._blocks = ContextBlocks(tower, memory, log) if wanted else None
        self._drafts = ContextDrafts(tower, memory, log) if wanted else None
        self._packed = ContextPacked(tower, memory, log) if wanted else None
        run = ContextPass(tower, self._steps, self._blocks, self._drafts, self._packed).run
        limits = options.pass_limits(device.type)
        self._most_tokens = limits.max_num_batched_tokens + limits.max_prefill_tokens
        super().__init__("context", run, admission, limits, threaded, turn)
        self.tower = tower
        self.link = link
        self.pool = pool
        self.cache = cache
        self.prefill_chunk = options.prefill_chunk_on(device.type)
        self._rounds = DraftRounds(self._submit, with_denoiser=link is not None)
        self._checks = DraftChecks(tower, self._submit)

    @property
    def pass_times(self) -> PassTimes:
        """What passes cost now, by which rounds are chosen."""
        return self._rounds.times

    def stats(self) -> EngineStats:
        """Counters since the start and the present load, the prefix cache's included."""
        stats, cache = super().stats(), self.cache
        if cache is None:
            return stats
        return replace(
            stats,
            cache_entries=cache.num_entries,
            cache_bytes=cache.num_bytes,
            cache_hits=cache.hits,
            cache_misses=cache.misses,
            cache_cached_tokens=cache.cached_tokens,
        )

    def warm_up(self, block_size: int = 16, rows: int | None = None) -> None:
        """Captures the graphs of decode steps, of drafts of up to 16 tokens, and of extensions by
        blocks of a length, before the first row would have to wait for it: for passes of up to
        `rows` rows (None: all). Those of prompts too, of a few rows."""
        rows = rows or self.pool.slots.num_slots
        if self._packed is not None:
            self._packed.warm_up(self.pool, self.prefill_chunk, self._most_tokens)
        if self._steps is not None:
            self._steps.warm_up(self.pool, rows)
        if self._drafts is not None:
            self._drafts.warm_up(self.pool, rows)
        if self._blocks is not None and self.link is not None:
            self._blocks.warm_up(self.pool, block_size, rows)

    async def open(self, row_id: str, capacity: int) -> int:
        """Waits for the row's slot and pages; returns how many rows still wait for theirs."""
        await self._open(ContextRow(row_id), capacity)
        if self.link is not None:
            self.link.open(row_id)
        return self._num_waiting

    async def prefill(
        self, row_id: str, prompt: Sequence[int], generated: Sequence[int], params: GenerationParams
    ) -> Prefilled:
        """Reads prompt and generated tokens, cut where the undisturbed row would have cut them."""
        row = self._row(row_id)
        return await self._owned(row, self._prefill(row, prompt, generated, params))

    async def extend(
        self,
        row_id: str,
        token_ids: Sequence[int],
        params: GenerationParams,
        output: Sequence[int] = (),
    ) -> Extended:
        """Appends a committed block, or one token of a mock_ar row, and publishes the state."""
        row = self._row(row_id)
        return await self._owned(row, self._extend(row, token_ids, params, output))

    async def decode(
        self,
        row_id: str,
        count: int,
        params: GenerationParams,
        output: Sequence[int] = (),
        costs: DraftCosts = UNKNOWN_COSTS,
    ) -> Block:
        """Takes the token drawn last, then reads it and draws the next, up to `count` times; where
        drafts are checked, see `DraftRounds.decode`."""
        row = self._row(row_id)
        return await self._owned(row, self._decode(row, count, params, output, costs))

    async def verify(
        self,
        row_id: str,
        draft: Sequence[int],
        params: GenerationParams,
        output: Sequence[int] = (),
        scores: DraftScores | None = None,
    ) -> Block:
        """Reads a draft and keeps the tokens that are accepted: those that the tower draws as well,
        or with `scores` and acceptance `mix` those that the mix draws, which at 1 is all without
        scores. Publishes the state if the row is mirrored at once."""
        row = self._row(row_id)
        return await self._owned(row, self._verify(row, draft, params, output, scores))

    async def update_mirror(self, row_id: str) -> None:
        """Brings the denoiser's mirror of the row to where its context ends, by one update; it
        sends nothing if the mirror stands there."""
        row = self._row(row_id)
        await self._owned(row, self._update_mirror(row))

    async def reseed(self, row_id: str, prepare: Callable[[], None]) -> None:
        """Sends all that the row's state holds, to a mirror that holds nothing, after `prepare`;
        both between the row's other calls. A row that has not been read yet is fine."""
        row = self._row(row_id)
        await self._owned(row, self._reseed(row, prepare))

    async def score(self, token_ids: Sequence[int], top_logprobs: int = 0) -> Scores:
        """Natural logarithms of the probabilities of tokens 1..n-1, and that many of the most
        probable tokens there; holds a row during the call."""
        row = self._add(ContextRow(f"score-{secrets.token_hex(8)}"))
        try:
            return await self._owned(row, self._score(row, token_ids, top_logprobs))
        finally:
            await self.release(row.row_id)

    async def logits(self, token_ids: Sequence[int]) -> Tensor:
        """The logits [n, V] at every token, in the tower's dtype and on its device; holds a row
        during the call."""
        row = self._add(ContextRow(f"logits-{secrets.token_hex(8)}"))
        try:
            return await self._owned(row, self._logits(row, token_ids))
        finally:
            await self.release(row.row_id)

    async def release(self, row_id: str) -> None:
        """Frees the row, after the pass that may still touch its state."""
        if self.link is not None:
            self.link.forget(row_id)
        await super().release(row_id)

    @in_turn
    async def _prefill(
        self,
        row: ContextRow,
        prompt: Sequence[int],
        generated: Sequence[int],
        params: GenerationParams,
    ) -> Prefilled:
        state = state_of(row.state)
        pieces = prefill_pieces(prompt, generated, params, self.prefill_chunk)
        # mock_ar reads the context as it was before its last token: that one stays in the log.
        held = [pieces.pop()] if params.traits.holds_prompt_end else []
        feed = None
        if self.link is not None and params.mirrored_at_once:
            feed = KvFeed(self.link, row.row_id, state)
        try:
            hidden, saved = self._restore(row, pieces)
            cached = state.position
            if saved < len(pieces):
                hidden = await self._read(row, pieces, saved, feed)
            elif feed is not None:
                await self._publish(row)
        finally:
            if feed is not None:
                await feed.close()
        for piece in held:
            await self._submit(ContextWork(state, piece, advance=False, prefill=True))
        if params.traits.unit == "draft" and not params.needs_denoiser:
            tokens = [*prompt, *generated]
            row.drafts = self._rounds.begin(tokens, params)
        if params.traits.holds_output_end and generated:
            row.token, row.committed = Token(generated[-1], 1.0, 0.0), True
        elif params.traits.tokens_from == "context":
            assert hidden is not None
            row.token = self._first_token(hidden, state.position, params, generated)
            row.hidden = hidden
        first = None
        if params.starts_with_context:
            assert hidden is not None
            first = self._first_token(hidden, state.position, params, generated)
        return Prefilled(len(pieces) - saved + len(held), cached, first)

    async def _read(
        self, row: ContextRow, pieces: Sequence[Sequence[int]], first: int, feed: KvFeed | None
    ) -> Tensor:
        """Reads pieces from `first` on; the update of the last pass is a snapshot. Returns the last
        hidden state [H]."""
        state = state_of(row.state)
        for piece in pieces[first:-1]:
            if feed is not None and state.position:
                feed.push()
            result = await self._submit(ContextWork(state, piece, prefill=True))
            self._note(row, piece, result.hidden)
        if feed is not None:
            await feed.flush()
        piece = pieces[-1]
        plan = UpdatePlan("snapshot", state.position, state.position + len(piece))
        writer = None if feed is None else self._writer(row, plan)
        work = ContextWork(state, piece, sink=writer, prefill=True)
        result = await self._write_through(row, work, writer)
        self._note(row, piece, result.hidden, end=True)
        return result.hidden

    def _restore(
        self, row: ContextRow, pieces: Sequence[Sequence[int]]
    ) -> tuple[Tensor | None, int]:
        """Starts the row from its longest cached prefix. Returns the last hidden state [H] of that
        and the number of pieces that need not be read."""
        if self.cache is None:
            return None, 0
        keys = chain_keys(pieces)
        best = self.cache.longest(keys)
        if best < 0:
            return None, 0
        state = state_of(row.state)
        hidden = self.cache.restore(keys[best], state)
        # Pages that the row had reserved are free again: another row may wait for them.
        self._admission.admit()
        row.key, row.cached_to = keys[best], state.position
        return hidden, best + 1

    def _note(
        self, row: ContextRow, piece: Sequence[int], hidden: Tensor, *, end: bool = False
    ) -> None:
        """Moves the row's key over a piece that was read, and puts the state into the prefix cache
        every CACHE_INTERVAL tokens, or at the `end` of a prompt."""
        if self.cache is None:
            return
        state = state_of(row.state)
        row.key = next_key(row.key, piece)
        if end or state.position - row.cached_to >= CACHE_INTERVAL:
            self.cache.insert(row.key, state, hidden)
            row.cached_to = state.position

    def _first_token(
        self, hidden: Tensor, position: int, params: GenerationParams, generated: Sequence[int]
    ) -> Token:
        logits = self.tower.logits(hidden.unsqueeze(0))
        sampler = Sampler.from_params(params)
        return token_of(sampler.draw(logits, [position], 0, DOMAIN_AUTOREGRESSIVE, generated), 0)

    @in_turn
    async def _extend(
        self,
        row: ContextRow,
        token_ids: Sequence[int],
        params: GenerationParams,
        output: Sequence[int],
    ) -> Extended:
        state = state_of(row.state)
        start = state.position
        if state.length > state.position:
            # A mock_ar row: its last token moves from the log into the state, the new one follows.
            self.tower.advance(state, 1)
            await self._publish(row)
            await self._submit(ContextWork(state, token_ids, advance=False))
            return Extended(1)
        plan = plan_update(self.tower.config, start, start + len(token_ids))
        writer, draw = self._writer(row, plan), None
        if params.starts_with_context:
            sampler, after = Sampler.from_params(params), [start + len(token_ids)]
            draw = Draw(sampler, after, output=output if sampler.penalizes else ())
        work = ContextWork(state, token_ids, draw=draw, sink=writer)
        result = await self._write_through(row, work, writer)
        self._note(row, token_ids, result.hidden)
        return Extended(1, None if result.drawn is None else token_of(result.drawn, 0))

    @in_turn
    async def _reseed(self, row: ContextRow, prepare: Callable[[], None]) -> None:
        prepare()
        row.mirrored = 0
        if row.state is not None and row.state.position:
            await self._publish(row)

    @in_turn
    async def _update_mirror(self, row: ContextRow) -> None:
        if row.mirrored < state_of(row.state).position:
            await self._publish(row)

    @in_turn
    async def _decode(
        self,
        row: ContextRow,
        count: int,
        params: GenerationParams,
        output: Sequence[int],
        costs: DraftCosts,
    ) -> Block:
        if row.drafts is not None:
            return await self._rounds.decode(row, row.drafts, count, params, output, costs)
        state = state_of(row.state)
        sampler = Sampler.from_params(params)
        start = state.position
        taken: list[Token] = []
        passes = 0
        while len(taken) < count:
            assert row.token is not None, "prefill comes first"
            token = row.token
            taken.append(token)
            if token.token_id == params.eos_token_id or state.position + 1 >= state.capacity:
                break
            draw = Draw(sampler, [state.position + 1])
            if sampler.penalizes:
                draw = replace(draw, output=[*output, *(token.token_id for token in taken)])
            result = await self._submit(ContextWork(state, [token.token_id], draw=draw))
            passes += 1
            assert result.drawn is not None
            row.token, row.hidden = token_of(result.drawn, 0), result.hidden
            self._note(row, [token.token_id], result.hidden)
        steps = tuple(range(len(taken)))
        return block_of(start, taken, steps, context_passes=passes)

    @in_turn
    async def _verify(
        self,
        row: ContextRow,
        draft: Sequence[int],
        params: GenerationParams,
        output: Sequence[int],
        scores: DraftScores | None,
    ) -> Block:
        block = await self._checks.check(row, draft, params, output, scores)
        if params.mirrored_at_once and row.mirrored < state_of(row.state).position:
            await self._publish(row)
        return block

    async def _score(self, row: ContextRow, token_ids: Sequence[int], top_logprobs: int) -> Scores:
        row.state = await self._admission.acquire(row.row_id, len(token_ids))
        return await score(self._submit, row.state, token_ids, top_logprobs, self.prefill_chunk)

    async def _logits(self, row: ContextRow, token_ids: Sequence[int]) -> Tensor:
        row.state = await self._admission.acquire(row.row_id, len(token_ids))
        return await logits(self._submit, row.state, token_ids, self.prefill_chunk)

    async def _submit(self, work: ContextWork) -> ContextResult:
        served = await self._loop.serve(
            work, len(work.tokens), prefill=work.prefill, patient=work.may_wait
        )
        self._rounds.times.note(served.passed)
        return served.result

    async def _write_through(
        self, row: ContextRow, work: ContextWork, writer: UpdateWriter | None
    ) -> ContextResult:
        """A pass of a row whose update is sent while it computes."""
        row.mirrored = 0
        try:
            result = await self._submit(work)
            if writer is not None:
                await writer.finish()
                self._has_reached(row, writer)
        finally:
            if writer is not None:
                writer.abort()
        return result

    def _writer(self, row: ContextRow, plan: UpdatePlan) -> UpdateWriter | None:
        if self.link is None:
            return None
        return self.link.begin(row.row_id, state_of(row.state), plan)

    async def _publish(self, row: ContextRow) -> None:
        """Sends an update from where the row's mirror stands to the state's position, for passes
        without a writer."""
        if self.link is None:
            return
        state, start = state_of(row.state), row.mirrored
        writer = self.link.begin(row.row_id, state, state.plan(start))
        # Until it is known to have arrived: a delta on top of a lost update would be wrong.
        row.mirrored = 0
        await send_state(writer, state, start)
        self._has_reached(row, writer)

    def _has_reached(self, row: ContextRow, writer: UpdateWriter) -> None:
        """Notes that the row's mirror stands where its state does."""
        state = state_of(row.state)
        row.mirrored = state.position
        state.follow(takes_shares=writer.takes_shares)
