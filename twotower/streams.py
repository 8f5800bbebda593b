"""A completion of towers in this process, block by block."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import suppress

from twotower.loop_thread import LoopThread
from twotower.towers.decoding.output import Output
from twotower.towers.decoding.services import Block
from twotower.towers.request.modes import FinishReason
from twotower.towers.request.results import TextBlock, Usage

Committed = AsyncGenerator[tuple[Block, str], None]


class _Stream:
    """A completion in the making.

    `seed` and `prompt_tokens` are there from the start; `token_ids` and `log_probs` are those of
    the blocks received so far, `finish_reason`, `matched_stop` (the stop string that ended the
    output, or None) and `usage` are there after the last block. The names are those of the
    client's streams.
    """

    def __init__(
        self,
        model: object,
        loop: LoopThread,
        output: Output,
        blocks: AsyncGenerator[Block, None],
        seed: int,
    ) -> None:
        self.seed = seed
        self.prompt_tokens = output.log.prompt_tokens
        self.token_ids: list[int] = []
        self.log_probs: list[float] = []
        self.finish_reason: FinishReason | None = None
        self.matched_stop: str | None = None
        self.usage: Usage | None = None
        # The loop ends with the model.
        self._model = model
        self._loop = loop
        self._output = output
        self._index = 0
        self._committed = output.commit(blocks)
        if output.finish_reason is not None:
            self._take(None)
        # A stream that nobody reads any more frees its row, too.
        self._closing = weakref.finalize(self, _abandon, loop, self._committed)
        self._closing.atexit = False

    def _take(self, committed: tuple[Block, str] | None) -> TextBlock | None:
        if committed is None:
            self.finish_reason = self._output.finish_reason
            self.matched_stop = self._output.matched_stop
            self.usage = self._output.log.usage()
            return None
        block, text = committed
        self.token_ids.extend(block.token_ids)
        self.log_probs.extend(block.log_probs)
        self._index += 1
        return TextBlock(
            self._index - 1,
            block.start,
            block.token_ids,
            text,
            block.commit_steps,
            block.confidences,
            block.log_probs,
        )


class LocalStream(_Stream):
    """Iterates over the blocks of one completion."""

    def __iter__(self) -> Iterator[TextBlock]:
        """Raises NumericalError. Leaving the loop early ends the completion."""
        try:
            while self.finish_reason is None:
                block = self._take(self._loop.run(_next(self._committed)))
                if block is not None:
                    yield block
        finally:
            self.close()

    def close(self) -> None:
        """Ends the completion and frees its row; after its end it does nothing."""
        if self._closing.detach() is not None:
            self._loop.run(_close(self._committed))


class AsyncLocalStream(_Stream):
    """As LocalStream, for `async for`. `aclose` it if you leave the loop before its end."""

    async def __aiter__(self) -> AsyncIterator[TextBlock]:
        """Raises NumericalError."""
        try:
            while self.finish_reason is None:
                block = self._take(await self._loop.await_(_next(self._committed)))
                if block is not None:
                    yield block
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        """Ends the completion and frees its row; after its end it does nothing."""
        if self._closing.detach() is not None:
            await self._loop.await_(_close(self._committed))


async def _next(committed: Committed) -> tuple[Block, str] | None:
    return await anext(committed, None)


async def _close(committed: Committed) -> None:
    # After an interrupt that did not wait, the last call may still be on its way to its end.
    while committed.ag_running:  # type: ignore[attr-defined]  # every async generator has it
        await asyncio.sleep(0.01)
    await committed.aclose()


def _abandon(loop: LoopThread, committed: Committed) -> None:
    with suppress(RuntimeError):
        loop.start(_close(committed))
