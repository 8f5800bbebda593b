"""Completions of a model in this process, block by block, for `for` and for `async for`.

A row is decoded in the model's own event loop, ahead of the reader: streams share their passes with
all other calls, and a reader that is slow holds nothing up.
"""

from __future__ import annotations

import asyncio
import queue
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import aclosing, suppress
from functools import partial
from typing import cast
from weakref import finalize

from twotower.call_loop import CallLoop, interruptible
from twotower.towers.decoding.commit_log import CommitLog
from twotower.towers.decoding.output import Begun, Output, text_block
from twotower.towers.decoding.services import ProvisionalBlock, TopLogProbs
from twotower.towers.request.params import FinishReason
from twotower.towers.request.results import TextBlock, Usage

# A place for the latest draft of a block: put once for every draft, empty where that was read.
Latest = deque[ProvisionalBlock]
Delivered = TextBlock | Latest | None
Put = Callable[[Delivered], None]


class _Stream:
    """State of a stream: `token_ids`, `log_probs` and `top_log_probs` of the blocks received so far
    and, after the last, `finish_reason`, `matched_stop` (the stop string that ended the output, or
    None) and `usage`. With `seed` and `token_ids` another stream can go on from here.
    """

    def __init__(self, calls: CallLoop, begun: Begun, put: Put) -> None:
        output, self._text, self._log, params = begun
        assert params.seed is not None
        self.seed = params.seed
        self.prompt_tokens = self._log.prompt_tokens
        self.token_ids: list[int] = []
        self.log_probs: list[float] = []
        self.top_log_probs: list[TopLogProbs] = []
        self.finish_reason: FinishReason | None = None
        self.matched_stop: str | None = None
        self.usage: Usage | None = None
        self._calls = calls
        self._call: Future[None] = calls.start(_deliver(output, self._log, put))
        self._call.add_done_callback(partial(_put_end, put))
        # A stream without references frees its row.
        finalize(self, calls.cancel, self._call)
        self._closed = False

    def _take(self, block: TextBlock | None) -> TextBlock | None:
        """Takes in what was delivered; None after the last block. Raises what ended the row."""
        if block is not None:
            self.token_ids.extend(block.token_ids)
            self.log_probs.extend(block.log_probs)
            self.top_log_probs.extend(block.top_log_probs)
            return block
        closed, self._closed = self._closed, True
        if closed:
            # By another thread or task, which has cancelled the call.
            return None
        self._call.result()
        self.finish_reason = self._log.finish_reason
        self.matched_stop = self._text.matched_stop
        self.usage = self._log.usage
        return None


class GenerationStream(_Stream, Iterator[TextBlock]):
    """Iterates over the blocks of a completion, which begins at once. A stream that is closed or
    dropped before its end frees its row.

    With `provisional` it also gives each ProvisionalBlock before its block; a slow reader gets the
    latest draft of each block."""

    def __init__(self, calls: CallLoop, begun: Begun) -> None:
        self._blocks: queue.SimpleQueue[Delivered] = queue.SimpleQueue()
        super().__init__(calls, begun, self._blocks.put)

    def __next__(self) -> TextBlock:
        """Raises NumericalError, and KeyboardInterrupt once the row is free."""
        if self._closed:
            raise StopIteration
        try:
            with interruptible():
                delivered = self._blocks.get()
                while isinstance(delivered, deque):
                    if delivered:
                        return _as_block(delivered.popleft())
                    delivered = self._blocks.get()
        except BaseException:
            self.close()
            raise
        block = self._take(delivered)
        if block is None:
            self._calls.settle()
            raise StopIteration
        return block

    def close(self) -> None:
        """Ends the stream and waits until its row is free. Does nothing after the end."""
        self._closed = True
        with interruptible():
            self._calls.end(self._call)
            self._calls.settle()


class AsyncGenerationStream(_Stream, AsyncIterator[TextBlock]):
    """As GenerationStream, for `async for` in the event loop in which it was made."""

    def __init__(self, calls: CallLoop, begun: Begun) -> None:
        loop = asyncio.get_running_loop()
        blocks: asyncio.Queue[Delivered] = asyncio.Queue()
        self._blocks = blocks

        def put(block: Delivered) -> None:
            loop.call_soon_threadsafe(blocks.put_nowait, block)

        super().__init__(calls, begun, put)

    async def __anext__(self) -> TextBlock:
        """Raises NumericalError."""
        if self._closed:
            raise StopAsyncIteration
        try:
            delivered = await self._blocks.get()
            while isinstance(delivered, deque):
                if delivered:
                    return _as_block(delivered.popleft())
                delivered = await self._blocks.get()
        except asyncio.CancelledError:
            self._closed = True
            self._calls.cancel(self._call)
            raise
        block = self._take(delivered)
        if block is None:
            raise StopAsyncIteration
        return block

    async def aclose(self) -> None:
        """As GenerationStream.close."""
        self._closed = True
        self._calls.cancel(self._call)
        await asyncio.gather(asyncio.wrap_future(self._call), return_exceptions=True)


async def _deliver(output: Output, log: CommitLog, put: Put) -> None:
    """Puts the blocks as they are committed, and drafts as they come."""
    latest = Latest(maxlen=1)
    async with aclosing(output):
        async for block, text in output:
            if isinstance(block, ProvisionalBlock):
                latest.append(block)
                put(latest)
            else:
                latest = Latest(maxlen=1)
                put(text_block(log, block, text))


def _as_block(draft: ProvisionalBlock) -> TextBlock:
    """A draft as what a stream iterates over: only a caller who asks for drafts has to know that
    there is another type."""
    return cast("TextBlock", draft)


def _put_end(put: Put, _: Future[None]) -> None:
    # A reader's event loop that has closed takes nothing more.
    with suppress(RuntimeError):
        put(None)
