"""The block loop of one row, for every mode: prefill, draft, commit, until a stop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from twotower.towers.decoding.services import Block, ContextService, DenoiserService, Prefilled
from twotower.towers.request.params import FinishReason, GenerationParams


async def generate_blocks(
    context: ContextService,
    denoiser: DenoiserService | None,
    row_id: str,
    prompt: Sequence[int],
    params: GenerationParams,
    generated: Sequence[int] = (),
    ease: Callable[[int], float] = lambda _waiting: 0.0,
) -> AsyncGenerator[Block, None]:
    """Yields the row's committed blocks, cut at the first EOS and at max_tokens.

    The last block has a finish_reason. `params` must have a seed; `generated` are tokens that an
    earlier attempt has committed. `ease` maps the number of rows that wait when this row is opened
    to a share, 0 to 1, of the way to its floors (GenerationParams.eased). Whatever ends the
    iteration, the row is released on both sides.
    """
    if params.traits.needs_denoiser and denoiser is None:
        raise ValueError(f"mode: {params.mode} needs a denoiser")
    params = params.for_prompt(len(prompt))
    loop = _RowLoop(context, denoiser, row_id, params, len(prompt))
    try:
        eased = ease(await loop.open())
        params = loop.serve_eased(eased)
        prefilled = await context.prefill(row_id, prompt, generated, params)
        left = params.max_tokens - len(generated)
        async for block in loop.blocks(prompt, generated):
            block = replace(
                block,
                context_passes=block.context_passes + prefilled.passes,
                cached_tokens=prefilled.cached_tokens,
                eased=eased,
            )
            prefilled = Prefilled(0)
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


class _RowLoop:
    """A row on both towers. Its context is extended by a block while the caller handles it."""

    def __init__(
        self,
        context: ContextService,
        denoiser: DenoiserService | None,
        row_id: str,
        params: GenerationParams,
        prompt_tokens: int,
    ) -> None:
        self._context = context
        self._denoiser = denoiser
        self._row_id = row_id
        self._params = params
        self._capacity = params.context_tokens(prompt_tokens)
        self._reading: asyncio.Task[int] | None = None

    async def open(self) -> int:
        """Waits until the row is open on both sides; returns how many other rows still wait."""
        waiting = await self._context.open(self._row_id, self._capacity)
        if self._denoiser is not None and self._params.traits.needs_denoiser:
            await self._denoiser.open(self._row_id, self._capacity)
        return waiting

    def serve_eased(self, eased: float) -> GenerationParams:
        """Sets the parameters of all blocks, eased by that share, and returns them."""
        self._params = self._params.eased(eased)
        return self._params

    def blocks(self, prompt: Sequence[int], generated: Sequence[int]) -> AsyncIterator[Block]:
        """Blocks without end: the caller stops at an EOS or at max_tokens."""
        position = len(prompt) + len(generated)
        if self._params.traits.unit == "draft":
            return self._verified_blocks(position - bool(generated), generated[-1:])
        return self._drafted_blocks(position, [*prompt, *generated][-1])

    async def _drafted_blocks(self, position: int, last_token: int) -> AsyncIterator[Block]:
        while True:
            # Requested while the context is still being extended: the denoiser waits for its
            # mirror, and a round trip between two blocks is saved.
            drafting = asyncio.ensure_future(self._next_block(position, last_token))
            try:
                passes = await self._read_passes()
                block = await drafting
            finally:
                drafting.cancel()
                await asyncio.gather(drafting, return_exceptions=True)
            yield replace(block, context_passes=block.context_passes + passes)
            position += len(block.token_ids)
            last_token = block.token_ids[-1]

    async def _verified_blocks(self, position: int, known: Sequence[int]) -> AsyncIterator[Block]:
        """Blocks from `position` on, where the context ends; `known` is the committed token at
        that position, or empty."""
        assert self._denoiser is not None
        while True:
            draft = await self._denoiser.denoise_block(
                self._row_id, position, self._params, tuple(known)
            )
            block = await self._context.verify(self._row_id, draft.token_ids, self._params)
            fresh = len(block.token_ids)
            # The context tower draws the last token, after all passes of the draft.
            steps = (*draft.commit_steps[len(known) :][: fresh - 1], draft.nfe)
            yield replace(block, commit_steps=steps, nfe=draft.nfe)
            position += len(known) + fresh - 1
            known = block.token_ids[-1:]

    def read(self, block: Block) -> None:
        """Starts to extend the context by a block, if the mode's tokens come from the denoiser."""
        if self._params.traits.tokens_from == "denoiser":
            extending = self._context.extend(self._row_id, block.token_ids)
            self._reading = asyncio.ensure_future(extending)

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

    async def _read_passes(self) -> int:
        if self._reading is None:
            return 0
        reading, self._reading = self._reading, None
        return await reading

    async def _next_block(self, position: int, last_token: int) -> Block:
        params = self._params
        if params.traits.tokens_from == "context":
            return await self._context.decode(self._row_id, params.block_size, params)
        assert self._denoiser is not None
        if params.traits.unit == "token":
            return await self._denoiser.next_token(self._row_id, position, last_token, params)
        return await self._denoiser.denoise_block(self._row_id, position, params)
