"""Texts become token ids beside the event loop: streams and health checks go on meanwhile.

A text that cannot fit is refused before it is read. The others are read in two lanes of one thread
each, so that a short text never waits for a long one; the tokenizer lets other threads run while it
works. What waits is bounded too, and more is refused as a full queue is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import BoundedSemaphore
from typing import TypeVar

from twotower.towers.errors import InvalidRequestError, QueueFullError
from twotower.towers.request.token_ids import check_text
from twotower.towers.text.tokenizer import Tokenizer, text_ids

T = TypeVar("T")
# Read where it is: it takes a fraction of a millisecond, about what a thread costs.
AT_ONCE_BYTES = 1 << 10
SHORT_BYTES = 32 << 10
MAX_SHORT_WAITING = 256
MAX_LONG_WAITING = 32


class Lane:
    """A thread, and how much may wait for it."""

    def __init__(self, name: str, limit: int) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"{name}-texts")
        self._places = BoundedSemaphore(limit)
        self._name = name
        self._limit = limit

    async def run(self, work: Callable[[], T]) -> T:
        """The result of `work`; cancelled in time, it is not begun. Raises QueueFullError."""
        if not self._places.acquire(blocking=False):
            raise QueueFullError(
                f"{self._limit} {self._name} texts wait to be read, expected fewer"
            )
        asked = self._thread.submit(work)
        # Only when it has ended, or will never begin: a thread cannot be stopped in between.
        asked.add_done_callback(lambda _: self._places.release())
        return await asyncio.wrap_future(asked)


class TextReader:
    """A tokenizer behind two lanes, for texts of up to `max_tokens` tokens.

    `token_bytes` is the most that one token can stand for, None if that is not known.
    """

    def __init__(self, tokenizer: Tokenizer | None, token_bytes: int | None, max_tokens: int):
        self._tokenizer = tokenizer
        self._token_bytes = token_bytes
        self._max_tokens = max_tokens
        self._short = Lane("short", MAX_SHORT_WAITING)
        self._long = Lane("long", MAX_LONG_WAITING)

    async def encode(self, field: str, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a request's text.

        Raises InvalidRequestError without a tokenizer and for a text that is too long or that it
        cannot spell, QueueFullError if too many wait.
        """
        check_text(field, text)
        size = len(text.encode())
        self.check_size(field, size)
        encode = partial(text_ids, self._tokenizer, field, text, add_special_tokens)
        token_ids = await self.run(size, encode)
        self.check_count(field, len(token_ids))
        return token_ids

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """Does work on a text of `size` bytes where it holds nothing up. Raises QueueFullError."""
        if size <= AT_ONCE_BYTES:
            return work()
        return await (self._short if size <= SHORT_BYTES else self._long).run(work)

    def check_count(self, field: str, count: int) -> None:
        """Raises InvalidRequestError for more tokens than the model takes."""
        if count > self._max_tokens:
            limit = f"at most {self._max_tokens} tokens"
            raise InvalidRequestError(field, f"{count} tokens", limit)

    def check_size(self, field: str, size: int) -> None:
        """Raises InvalidRequestError for more bytes of text than the most tokens can be."""
        if self._token_bytes is None or size <= self._max_tokens * self._token_bytes:
            return
        raise InvalidRequestError(
            field,
            f"{size} bytes of text",
            f"at most {self._max_tokens} tokens, which are at most {self._token_bytes} bytes each",
        )
