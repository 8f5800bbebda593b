"""The block loop of one row, for every mode: prefill, draft, commit, until a stop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import partial
from typing import TypeVar

from twotower.towers.decoding.draft_times import DraftTimes
from twotower.towers.decoding.provisional import Drafting
from twotower.towers.decoding.services import (
    Block,
    BlockTiming,
    ContextService,
    DenoiserService,
    Extended,
    NextDraft,
    Prefilled,
    ProvisionalBlock,
    Token,
    Watcher,
)
from twotower.towers.request.params import FinishReason, GenerationParams

# Committed blocks and, if the row asks for them, drafts of the next.
Blocks = AsyncGenerator[Block | ProvisionalBlock, None]
Drafted = TypeVar("Drafted", Block, ProvisionalBlock)


async def generate_blocks(
    context: ContextService,
    denoiser: DenoiserService | None,
    row_id: str,
    prompt: Sequence[int],
    params: GenerationParams,
    generated: Sequence[int] = (),
    ease: Callable[[int], float] = lambda _waiting: 0.0,
    draft_times: DraftTimes | None = None,
) -> Blocks:
    """Yields the row's committed blocks, cut at the first EOS and at max_tokens; with
    `params.provisional` also drafts of each, as they come and if the reader is slow only the
    latest.

    The last block has a finish_reason. `params` must have a seed; `generated` are tokens that an
    earlier attempt has committed. `ease` maps the number of rows that wait when this row is opened
    to a share, 0 to 1, of the way to its floors (GenerationParams.eased). `draft_times` are those
    of the denoiser's drafts, kept for all rows of a pair. Whatever ends the iteration, the row is
    released on both sides.
    """
    if params.needs_denoiser and denoiser is None:
        raise ValueError(f"mode: {params.mode} needs a denoiser")
    if not params.uses_denoiser:
        denoiser = None
    params = params.for_prompt(len(prompt)).resolved()
    times = draft_times or DraftTimes()
    loop = _RowLoop(context, denoiser, row_id, params, len(prompt), generated, times)
    begin, clock = time.time(), _Clock()
    try:
        eased = ease(await loop.open())
        queue_s = clock.lap()
        params = loop.serve_eased(eased)
        prefilled = await context.prefill(row_id, prompt, generated, params)
        first: BlockTiming | None = BlockTiming(begin, queue_s, clock.lap())
        left = params.max_tokens - len(generated)
        async with aclosing(loop.blocks(prompt, generated, prefilled.first)) as blocks:
            async for block in blocks:
                if isinstance(block, ProvisionalBlock):
                    yield block
                    continue
                block = replace(
                    block,
                    context_passes=block.context_passes + prefilled.passes,
                    cached_tokens=prefilled.cached_tokens,
                    eased=eased,
                    timing=_joined(first, block.timing),
                )
                prefilled, first = Prefilled(0), None
                block = cut(block, left, params.eos_token_id)
                left -= len(block.token_ids)
                if block.finish_reason is not None:
                    yield block
                    return
                loop.read(block)
                yield block
    finally:
        await asyncio.shield(loop.close())


def cut(block: Block, left: int, eos_token_id: int | None) -> Block:
    """The block up to its first EOS and to `left` tokens; with a finish_reason if the row ends."""
    tokens = block.token_ids[:left]
    reason: FinishReason | None = "length" if len(tokens) == left else None
    if eos_token_id in tokens:
        tokens = tokens[: tokens.index(eos_token_id) + 1]
        reason = "stop"
    return replace(block.first(len(tokens)), finish_reason=reason)


async def committed(blocks: Blocks) -> AsyncGenerator[Block, None]:
    """The committed blocks of a row alone; closes `blocks` with itself."""
    async with aclosing(blocks):
        async for block in blocks:
            if isinstance(block, Block):
                yield block


class _Clock:
    """Measures how long things take that follow each other."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def lap(self) -> float:
        """Seconds since the last call, or since the beginning."""
        before, self._last = self._last, time.monotonic()
        return self._last - before


def _joined(first: BlockTiming | None, timing: BlockTiming | None) -> BlockTiming | None:
    """The timing of a block, which in a row's first block begins with the row."""
    if first is None or timing is None:
        return timing
    begun = first.begin, first.queue_s, first.prefill_s
    return BlockTiming(*begun, timing.transfer_s, timing.denoise_s, timing.commit_s)


def _with_commit(timing: BlockTiming | None, seconds: float) -> BlockTiming | None:
    """The timing with the time of the block's pass of the context tower."""
    return None if timing is None else replace(timing, commit_s=seconds)


def _committed(block: Block, extended: Extended, seconds: float) -> Block:
    """The block with the passes and the time of the extension by the block before it."""
    passes = block.context_passes + extended.passes
    return replace(block, context_passes=passes, timing=_with_commit(block.timing, seconds))


def _block_of(start: int, token: Token) -> Block:
    """A block of a token of the context tower alone, which no denoiser has seen."""
    return Block(
        start,
        (token.token_id,),
        (0,),
        (token.confidence,),
        nfe=0,
        log_probs=(token.log_prob,),
        top_log_probs=() if token.top is None else (token.top,),
        timing=BlockTiming(time.time()),
    )


def _begun(block: Drafted, first: Token) -> Drafted:
    """A block or draft that begins with a token of the context tower, with what that tower gave
    it."""
    confidences = (first.confidence, *block.confidences[1:])
    if isinstance(block, ProvisionalBlock):
        return replace(block, confidences=confidences)
    return replace(
        block,
        confidences=confidences,
        log_probs=(first.log_prob, *block.log_probs[1:]),
        top_log_probs=() if first.top is None else (first.top, *block.top_log_probs[1:]),
    )


class _RowLoop:
    """A row on both towers. Its context is extended by a block while the caller handles it."""

    def __init__(
        self,
        context: ContextService,
        denoiser: DenoiserService | None,
        row_id: str,
        params: GenerationParams,
        prompt_tokens: int,
        generated: Sequence[int],
        draft_times: DraftTimes,
    ) -> None:
        self._context = context
        self._denoiser = denoiser
        self._row_id = row_id
        self._params = params
        self._draft_times = draft_times
        self._capacity = params.context_tokens(prompt_tokens)
        self._reading: asyncio.Task[tuple[Extended, float]] | None = None
        # What the towers are told of the output: all of it with penalties, otherwise nothing.
        self._output = list(generated) if params.penalizes else []

    async def open(self) -> int:
        """Waits until the row is open on both sides; returns how many other rows still wait."""
        waiting = await self._context.open(self._row_id, self._capacity)
        if self._denoiser is not None:
            await self._denoiser.open(self._row_id, self._capacity)
        return waiting

    def serve_eased(self, eased: float) -> GenerationParams:
        """Sets the parameters of all blocks, eased by that share, and returns them."""
        self._params = self._params.eased(eased)
        return self._params

    def blocks(
        self, prompt: Sequence[int], generated: Sequence[int], first: Token | None
    ) -> Blocks:
        """Blocks without end: the caller stops at an EOS or at max_tokens. `first` is the token
        that the context tower drew after what it has read."""
        position = len(prompt) + len(generated)
        if self._params.traits.unit == "draft":
            left = self._params.max_tokens - len(generated)
            return self._checked_blocks(position - bool(generated), generated[-1:], left)
        if self._params.starts_with_context:
            assert first is not None
            return self._started_blocks(position, first)
        return self._drafted_blocks(position, [*prompt, *generated][-1])

    async def _drafted_blocks(self, position: int, last_token: int) -> Blocks:
        while True:
            # Requested while the context is still being extended: the denoiser waits for its
            # mirror, and a round trip between two blocks is saved.
            async with aclosing(self._drafting(position, last_token)) as drafting:
                extended, commit_s = await self._read_block()
                async for draft in drafting:
                    yield draft
                block = await drafting.block()
            self._note(block.token_ids)
            yield _committed(block, extended, commit_s)
            position += len(block.token_ids)
            last_token = block.token_ids[-1]

    async def _started_blocks(self, position: int, first: Token) -> Blocks:
        """Blocks that begin with a token of the context tower, which it draws in the pass that
        reads the block before; `first` is that of the block at `position`."""
        extended, commit_s = Extended(0), 0.0
        while True:
            self._note((first.token_id,))
            if self._params.block_size == 1 or first.token_id == self._params.eos_token_id:
                block = _block_of(position, first)
            else:
                known = (first.token_id,)
                async with aclosing(self._drafting(position, known=known)) as drafting:
                    async for provisional in drafting:
                        yield _begun(provisional, first)
                    block = _begun(await drafting.block(), first)
            self._note(block.token_ids[1:])
            yield _committed(block, extended, commit_s)
            position += len(block.token_ids)
            extended, commit_s = await self._read_block()
            assert extended.first is not None
            first = extended.first

    async def _checked_blocks(self, position: int, known: Sequence[int], left: int) -> Blocks:
        """Blocks from `position` on, where the context ends; `known` is the committed token at
        that position, or empty. Rounds of the context tower alone, and drafts of the denoiser
        where they pay; nothing but these where `params` say so."""
        params = self._params
        asked: NextDraft = "checked"
        while True:
            if not params.needs_denoiser:
                block = await self._rounds(min(left, params.block_size))
                asked = block.next_draft
                if block.token_ids:
                    yield block
                    position, left = block.end - 1, left - len(block.token_ids)
                    known = block.token_ids[-1:]
            if asked:
                async with aclosing(self._drafted(asked, position, known)) as blocks:
                    async for draft in blocks:
                        yield draft
                        if isinstance(draft, Block):
                            block = draft
                position, left = block.end - 1, left - len(block.token_ids)
                known = block.token_ids[-1:]

    async def _rounds(self, count: int) -> Block:
        """Rounds that the context tower makes alone."""
        begin, clock = time.time(), _Clock()
        block = await self._context.decode(
            self._row_id, count, self._params, tuple(self._output), self._draft_times.costs()
        )
        self._note(block.token_ids)
        return replace(block, timing=BlockTiming(begin, denoise_s=clock.lap()))

    async def _drafted(self, asked: NextDraft, position: int, known: Sequence[int]) -> Blocks:
        """A draft of the denoiser as it comes, and last what the context tower accepts of it."""
        params, clock = self._params, _Clock()
        if asked == "whole":
            params = params.committed_whole()
        ask = partial(self._next_block, position, -1, tuple(known), params=params)
        async with aclosing(Drafting(ask, watched=params.provisional)) as drafting:
            async for provisional in drafting:
                yield provisional
            draft = await drafting.block()
        self._draft_times.note(asked, draft.passes, clock.lap())
        block = await self._context.verify(
            self._row_id, draft.token_ids, params, tuple(self._output), draft.draft_scores
        )
        timing = _with_commit(draft.timing, clock.lap())
        # The context tower draws the last token, after all passes of the draft.
        fresh = len(block.token_ids)
        steps = (*draft.commit_steps[len(known) :][: fresh - 1], draft.nfe)
        self._note(block.token_ids)
        yield replace(
            block, commit_steps=steps, nfe=draft.nfe, timing=timing, drafted_by="denoiser"
        )

    def read(self, block: Block) -> None:
        """Starts to extend the context by a block, if the mode's tokens come from the denoiser."""
        if self._params.traits.tokens_from == "denoiser":
            self._reading = asyncio.ensure_future(self._extend(block.token_ids))

    async def close(self) -> None:
        """Waits for a running extension, then releases the row on both sides.

        The denoiser is first: on one device it reads the context tower's state.
        """
        if self._reading is not None:
            self._reading.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await self._reading
        try:
            if self._denoiser is not None:
                await self._denoiser.release(self._row_id)
        finally:
            await self._context.release(self._row_id)

    async def _extend(self, token_ids: Sequence[int]) -> tuple[Extended, float]:
        clock = _Clock()
        extended = await self._context.extend(
            self._row_id, token_ids, self._params, tuple(self._output)
        )
        return extended, clock.lap()

    async def _read_block(self) -> tuple[Extended, float]:
        """The extension that runs and its seconds, once it has ended."""
        if self._reading is None:
            return Extended(0), 0.0
        reading, self._reading = self._reading, None
        return await reading

    def _note(self, token_ids: Sequence[int]) -> None:
        if self._params.penalizes:
            self._output += token_ids

    def _drafting(self, position: int, last_token: int = -1, known: Sequence[int] = ()) -> Drafting:
        """Starts to make the next block."""
        params = self._params
        watched = params.provisional and params.traits.unit != "token"
        return Drafting(partial(self._next_block, position, last_token, known), watched=watched)

    async def _next_block(
        self,
        position: int,
        last_token: int,
        known: Sequence[int],
        watch: Watcher | None,
        params: GenerationParams | None = None,
    ) -> Block:
        begin, clock = time.time(), _Clock()
        params = params or self._params
        if self._denoiser is not None and not params.mirrored_at_once:
            await self._context.update_mirror(self._row_id)
        sent_s = clock.lap()
        block = await self._ask(position, last_token, known, watch, params)
        waited = 0.0 if block.timing is None else block.timing.transfer_s
        denoise_s = max(0.0, clock.lap() - waited)
        timing = BlockTiming(begin, transfer_s=sent_s + waited, denoise_s=denoise_s)
        return replace(block, timing=timing)

    async def _ask(
        self,
        position: int,
        last_token: int,
        known: Sequence[int],
        watch: Watcher | None,
        params: GenerationParams,
    ) -> Block:
        """Asks a tower for the next block, draft or token."""
        row_id, output = self._row_id, tuple(self._output)
        if params.traits.denoiser == "never":
            return await self._context.decode(row_id, params.block_size, params, output)
        assert self._denoiser is not None
        if params.traits.unit == "token":
            return await self._denoiser.next_token(row_id, position, last_token, params, output)
        return await self._denoiser.denoise_block(row_id, position, params, known, output, watch)
