"""The context tower's engine: prefill, extension, decoding and verification of many rows."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from torch import Tensor

from twotower.towers.decoding.sampling import Draw, Drawn, Sampler
from twotower.towers.decoding.services import Block, Prefilled
from twotower.towers.engine.admission import Admission
from twotower.towers.engine.context_blocks import ContextBlocks
from twotower.towers.engine.context_pass import ContextPass, ContextResult, ContextWork
from twotower.towers.engine.context_steps import ContextSteps
from twotower.towers.engine.cuda_graph import GraphMemory
from twotower.towers.engine.engine import Engine, EngineOptions, EngineRow, state_of
from twotower.towers.engine.prefill import (
    KvFeed,
    default_prefill_chunk,
    prefill_pieces,
    send_update,
)
from twotower.towers.engine.scheduler import PassLimits
from twotower.towers.model.backbone import Tower
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.request.params import GenerationParams
from twotower.towers.state.link import StateLink, UpdateWriter
from twotower.towers.state.pool import StatePool
from twotower.towers.state.prefix_cache import PrefixCache, chain_keys, next_key
from twotower.towers.state.update import UpdatePlan, plan_update

# A snapshot of a hybrid's state is large: block ends enter the prefix cache this far apart.
CACHE_INTERVAL = 256


@dataclass(frozen=True)
class _Token:
    token_id: int
    confidence: float
    log_prob: float


@dataclass(eq=False)
class _Row(EngineRow):
    """`own` is the tower's token at the state's position, once drawn; `committed` tells whether
    the output has it already. `key` names what was read, for the prefix cache. `turn` is held by
    the call that works on the state."""

    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    own: _Token | None = None
    committed: bool = False
    key: bytes = b""
    cached_to: int = 0


P = ParamSpec("P")
R = TypeVar("R")
_Call = Callable[Concatenate["ContextEngine", _Row, P], Coroutine[Any, Any, R]]


def _in_turn(call: _Call[P, R]) -> _Call[P, R]:
    """Makes a row's call wait until no other works on the row's state."""

    @wraps(call)
    async def alone(engine: ContextEngine, row: _Row, /, *args: P.args, **kwargs: P.kwargs) -> R:
        async with row.turn:
            return await call(engine, row, *args, **kwargs)

    return alone


class ContextEngine(Engine[_Row, ContextWork, ContextResult]):
    """Rows in a context tower. `link` carries their states to a denoiser, if there is one.

    `device_steps` (None: on CUDA) runs decode steps over fixed buffers, as CUDA graphs.
    `prefill_chunk` (None: by device) is the grid on which prompts are read.
    """

    _admission: Admission

    def __init__(
        self,
        tower: ContextTower,
        link: StateLink | None = None,
        *,
        pool: StatePool | None = None,
        limits: PassLimits | None = None,
        max_waiting: int | None = None,
        prefix_cache_bytes: int = 0,
        threaded: bool = False,
        device_steps: bool | None = None,
        prefill_chunk: int | None = None,
    ) -> None:
        pool = pool or EngineOptions().pool_for(tower)
        cache = PrefixCache(pool, prefix_cache_bytes) if prefix_cache_bytes else None
        admission = Admission(pool, cache.reclaim if cache else None, max_waiting)
        wanted = tower.device.type == "cuda" if device_steps is None else device_steps
        memory = GraphMemory(tower.device)
        self._steps = ContextSteps(tower, memory) if wanted else None
        self._blocks = ContextBlocks(tower, memory) if wanted else None
        run = ContextPass(tower, self._steps, self._blocks).run
        limits = limits or PassLimits.for_device(tower.device.type)
        super().__init__("context", run, admission, limits, threaded)
        self.tower = tower
        self.link = link
        self.pool = pool
        self.cache = cache
        self.prefill_chunk = prefill_chunk or default_prefill_chunk(tower.device)

    @classmethod
    def with_options(
        cls,
        tower: ContextTower,
        link: StateLink | None,
        options: EngineOptions,
        *,
        threaded: bool,
        readers: Sequence[Tower] = (),
    ) -> ContextEngine:
        """An engine as its operator wants it; `readers` are towers that read its states in place.

        Raises ConfigError if the states have no room.
        """
        return cls(
            tower,
            link,
            pool=options.pool_for(tower, *readers),
            limits=options.limits,
            max_waiting=options.max_waiting,
            prefix_cache_bytes=options.prefix_cache_bytes,
            threaded=threaded,
            prefill_chunk=options.prefill_chunk,
        )

    def stats(self) -> dict[str, float]:
        """Counters since the start and the present load."""
        cache = self.cache.stats() if self.cache is not None else {}
        return {
            **super().stats(),
            **{f"cache_{name}": value for name, value in cache.items()},
        }

    def warm_up(self, block_size: int = 16, rows: int | None = None) -> None:
        """Captures the graphs of decode steps, and of extensions by blocks of a length, before the
        first row would have to wait for it: for passes of up to `rows` rows (None: all)."""
        rows = rows or self.pool.slots.num_slots
        if self._steps is not None:
            self._steps.warm_up(self.pool, rows)
        if self._blocks is not None and self.link is not None:
            self._blocks.warm_up(self.pool, block_size, rows)

    async def open(self, row_id: str, capacity: int) -> int:
        """Waits for the row's slot and pages; returns how many rows still wait for theirs."""
        await self._open(_Row(row_id), capacity)
        if self.link is not None:
            self.link.open(row_id)
        return self._num_waiting

    async def prefill(
        self, row_id: str, prompt: Sequence[int], generated: Sequence[int], params: GenerationParams
    ) -> Prefilled:
        """Reads prompt and generated tokens, cut where the undisturbed row would have cut them."""
        row = self._row(row_id)
        return await self._owned(row, self._prefill(row, prompt, generated, params))

    async def extend(self, row_id: str, token_ids: Sequence[int]) -> int:
        """Appends a committed block, or one token of a mock_ar row, and publishes the state."""
        row = self._row(row_id)
        return await self._owned(row, self._extend(row, token_ids))

    async def decode(self, row_id: str, count: int, params: GenerationParams) -> Block:
        """Takes the token drawn last, then reads it and draws the next, up to `count` times."""
        row = self._row(row_id)
        return await self._owned(row, self._decode(row, count, params))

    async def verify(self, row_id: str, draft: Sequence[int], params: GenerationParams) -> Block:
        """Reads a draft, keeps what equals the tower's own tokens, and publishes that much."""
        row = self._row(row_id)
        return await self._owned(row, self._verify(row, draft, params))

    async def reseed(self, row_id: str, prepare: Callable[[], None]) -> None:
        """Sends all that the row's state holds, to a mirror that holds nothing, after `prepare`;
        both between the row's other calls. A row that has not been read yet is fine."""
        row = self._row(row_id)
        await self._owned(row, self._reseed(row, prepare))

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        """Natural-log probabilities of tokens 1..n-1; holds a row as long as the call."""
        row = self._add(_Row(f"score-{secrets.token_hex(8)}"))
        try:
            return await self._owned(row, self._score(row, token_ids))
        finally:
            await self.release(row.row_id)

    async def release(self, row_id: str) -> None:
        """Frees the row, after the pass that may still touch its state."""
        if self.link is not None:
            self.link.forget(row_id)
        await super().release(row_id)

    @_in_turn
    async def _prefill(
        self,
        row: _Row,
        prompt: Sequence[int],
        generated: Sequence[int],
        params: GenerationParams,
    ) -> Prefilled:
        state = state_of(row.state)
        pieces = prefill_pieces(prompt, generated, params, self.prefill_chunk)
        # mock_ar reads the context as it was before its last token: that one stays in the log.
        held = [pieces.pop()] if params.traits.holds_prompt_end else []
        own = Draw(Sampler.from_params(params), [len(prompt) + len(generated)])
        first_is_known = params.traits.holds_output_end and bool(generated)
        draw = own if params.traits.tokens_from == "context" and not first_is_known else None
        feed = None
        if self.link is not None and params.traits.needs_denoiser:
            feed = KvFeed(self.link, row.row_id, state)
        try:
            hidden, saved = self._restore(row, pieces)
            cached = state.position
            if saved < len(pieces):
                hidden = await self._read(row, pieces, saved, feed)
            elif feed is not None:
                await self._publish(row, 0)
        finally:
            if feed is not None:
                await feed.close()
        for piece in held:
            await self._submit(ContextWork(state, piece, advance=False, prefill=True))
        if draw is not None:
            assert hidden is not None
            row.own = self._first_token(draw, hidden)
        if first_is_known:
            row.own, row.committed = _Token(generated[-1], 1.0, 0.0), True
        return Prefilled(len(pieces) - saved + len(held), cached)

    async def _read(
        self, row: _Row, pieces: Sequence[Sequence[int]], first: int, feed: KvFeed | None
    ) -> Tensor:
        """Reads pieces from `first` on; the last pass brings the snapshot with it."""
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
        result = await self._write_through(work, writer)
        self._note(row, piece, result.hidden, end=True)
        return result.hidden

    def _restore(self, row: _Row, pieces: Sequence[Sequence[int]]) -> tuple[Tensor | None, int]:
        """Takes what the prefix cache has; the last hidden state and the pieces that it saves."""
        if self.cache is None:
            return None, 0
        keys = chain_keys(pieces)
        best = self.cache.longest(keys)
        if best < 0:
            return None, 0
        state = state_of(row.state)
        hidden = self.cache.restore(keys[best], state)
        # Pages that the row had reserved are free again: somebody may wait for them.
        self._admission.admit()
        row.key, row.cached_to = keys[best], state.position
        return hidden, best + 1

    def _note(self, row: _Row, piece: Sequence[int], hidden: Tensor, *, end: bool = False) -> None:
        """Names what has been read by now, and lets the prefix cache have it now and then."""
        if self.cache is None:
            return
        state = state_of(row.state)
        row.key = next_key(row.key, piece)
        if end or state.position - row.cached_to >= CACHE_INTERVAL:
            self.cache.insert(row.key, state, hidden)
            row.cached_to = state.position

    def _first_token(self, draw: Draw, hidden: Tensor) -> _Token:
        logits = self.tower.logits(hidden.unsqueeze(0))
        drawn = draw.sampler.draw(logits, draw.positions, draw.step, draw.domain)
        return _token(drawn, 0)

    @_in_turn
    async def _extend(self, row: _Row, token_ids: Sequence[int]) -> int:
        state = state_of(row.state)
        start = state.position
        if state.length > state.position:
            # A mock_ar row: its last token moves from the log into the state, the new one follows.
            self.tower.advance(state, 1)
            await self._publish(row, start)
            await self._submit(ContextWork(state, token_ids, advance=False))
            return 1
        plan = plan_update(self.tower.config, start, start + len(token_ids))
        writer = self._writer(row, plan)
        result = await self._write_through(ContextWork(state, token_ids, sink=writer), writer)
        self._note(row, token_ids, result.hidden)
        return 1

    @_in_turn
    async def _reseed(self, row: _Row, prepare: Callable[[], None]) -> None:
        prepare()
        if row.state is not None and row.state.position:
            await self._publish(row, 0)

    @_in_turn
    async def _decode(self, row: _Row, count: int, params: GenerationParams) -> Block:
        state = state_of(row.state)
        sampler = Sampler.from_params(params)
        start = state.position
        taken: list[_Token] = []
        passes = 0
        while len(taken) < count:
            assert row.own is not None, "prefill comes first"
            token = row.own
            taken.append(token)
            if token.token_id == params.eos_token_id or state.position + 1 >= state.capacity:
                break
            draw = Draw(sampler, [state.position + 1])
            result = await self._submit(ContextWork(state, [token.token_id], draw=draw))
            passes += 1
            assert result.drawn is not None
            row.own = _token(result.drawn, 0)
            self._note(row, [token.token_id], result.hidden)
        steps = tuple(range(len(taken)))
        return _block(start, taken, steps, context_passes=passes)

    @_in_turn
    async def _verify(self, row: _Row, draft: Sequence[int], params: GenerationParams) -> Block:
        state = state_of(row.state)
        assert row.own is not None, "prefill comes first"
        start, known = state.position, int(row.committed)
        draw = Draw(
            Sampler.from_params(params), [start + 1 + offset for offset in range(len(draft))]
        )
        result = await self._submit(ContextWork(state, draft, advance=False, draw=draw))
        assert result.drawn is not None
        own = [row.own, *(_token(result.drawn, index) for index in range(len(draft)))]
        accepted = 0
        while accepted < len(draft) and draft[accepted] == own[accepted].token_id:
            accepted += 1
        self.tower.advance(state, accepted)
        state.truncate()
        row.own, row.committed = own[accepted], True
        if accepted:
            await self._publish(row, start)
        return _block(
            start + known,
            own[known : accepted + 1],
            (0,) * (accepted + 1 - known),
            context_passes=1,
            accepted=accepted - known,
            drafted=len(draft) - known,
        )

    async def _score(self, row: _Row, token_ids: Sequence[int]) -> list[float]:
        state = row.state = await self._admission.acquire(row.row_id, len(token_ids))
        logprobs: list[float] = []
        read = token_ids[:-1]
        for start in range(0, len(read), self.prefill_chunk):
            piece = read[start : start + self.prefill_chunk]
            targets = token_ids[start + 1 : start + 1 + len(piece)]
            work = ContextWork(state, piece, targets=targets, prefill=True)
            result = await self._submit(work)
            logprobs.extend(result.logprobs)
        return logprobs

    async def _submit(self, work: ContextWork) -> ContextResult:
        return await self._loop.submit(work, len(work.tokens), prefill=work.prefill)

    async def _write_through(self, work: ContextWork, writer: UpdateWriter | None) -> ContextResult:
        """A pass whose update travels while it computes."""
        try:
            result = await self._submit(work)
            if writer is not None:
                await writer.finish()
        finally:
            if writer is not None:
                writer.abort()
        return result

    def _writer(self, row: _Row, plan: UpdatePlan) -> UpdateWriter | None:
        if self.link is None:
            return None
        return self.link.begin(row.row_id, state_of(row.state), plan)

    async def _publish(self, row: _Row, start: int) -> None:
        """Sends what has come to the state since `start`, for passes that could not do it."""
        if self.link is None:
            return
        state = state_of(row.state)
        update = state.export(start)
        await send_update(self.link.begin(row.row_id, state, update.plan), update)


def _token(drawn: Drawn, index: int) -> _Token:
    return _Token(drawn.token_ids[index], drawn.confidences[index], drawn.log_probs[index])


def _block(
    start: int,
    tokens: Sequence[_Token],
    steps: tuple[int, ...],
    *,
    context_passes: int,
    accepted: int = 0,
    drafted: int = 0,
) -> Block:
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
    )
