"""Drafts of a block that is being denoised, for readers that want to see it fill."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from twotower.towers.decoding.services import Block, ProvisionalBlock, Watcher
from twotower.towers.decoding.unmasking import BlockDraft


def draft_on_host(
    start: int,
    draft: BlockDraft,
    positions: Sequence[int],
    predicted: Sequence[int],
    confident: Sequence[float],
) -> ProvisionalBlock:
    """A draft after the step that has predicted tokens at `positions` of the block."""
    token_ids, confidences = list(draft.token_ids), list(draft.confidences)
    for position, token, confidence in zip(positions, predicted, confident, strict=True):
        if not draft.is_committed(position):
            token_ids[position], confidences[position] = token, confidence
    masked = tuple(not draft.is_committed(i) for i in range(len(token_ids)))
    return ProvisionalBlock(start, draft.step - 1, tuple(token_ids), masked, tuple(confidences))


class Drafting:
    """A block that `call` makes, and an iterator over its drafts until it is made.

    Of drafts that nobody has taken the latest is kept: a slow reader misses those before it.
    Without `watched` there are none, and the call is not asked for them. `period_s` is the least
    time between two drafts; one that would have to wait for it when the block is made is dropped.
    """

    def __init__(
        self,
        call: Callable[[Watcher | None], Coroutine[Any, Any, Block]],
        *,
        watched: bool,
        period_s: float = 0.0,
    ) -> None:
        self._period = period_s
        self._next_at = 0.0
        self._latest: ProvisionalBlock | None = None
        self._moved = asyncio.Event()
        self._watched = watched
        self._task = asyncio.ensure_future(call(self._take if watched else None))
        if watched:
            self._task.add_done_callback(lambda _: self._moved.set())

    def __aiter__(self) -> Drafting:
        return self

    async def __anext__(self) -> ProvisionalBlock:
        clock = asyncio.get_running_loop().time
        if (wait := self._next_at - clock()) > 0:
            await asyncio.wait([self._task], timeout=wait)
            if self._task.done():
                raise StopAsyncIteration
        while self._latest is None:
            if not self._watched or self._task.done():
                raise StopAsyncIteration
            await self._moved.wait()
            self._moved.clear()
        latest, self._latest = self._latest, None
        self._next_at = clock() + self._period if self._period else 0.0
        return latest

    async def block(self) -> Block:
        """The block. Raises what the call raised."""
        return await self._task

    async def aclose(self) -> None:
        """Gives the block up, if it is not made."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def _take(self, draft: ProvisionalBlock) -> None:
        self._latest = draft
        self._moved.set()
