"""Drafts of a block that is being denoised, for readers that want to see it fill."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Callable, Sequence
from typing import Any, Protocol

from twotower.towers.decoding.sampling import Drawn
from twotower.towers.decoding.services import Block, ProvisionalBlock, Watcher
from twotower.towers.decoding.unmasking import BlockDraft


class _Kept(Protocol):
    """A draft as the device has it after a step: the mask token and 0.0 where it is masked."""

    token_ids: list[int]
    commit_steps: list[int]
    confidences: list[float]


def draft_on_host(
    start: int, draft: BlockDraft, positions: Sequence[int], drawn: Drawn
) -> ProvisionalBlock:
    """A draft after the step that has drawn tokens at `positions` of the block."""
    token_ids, confidences = list(draft.token_ids), list(draft.confidences)
    for index, position in enumerate(positions):
        if not draft.is_committed(position):
            token_ids[position] = drawn.token_ids[index]
            confidences[position] = drawn.confidences[index]
    masked = tuple(not draft.is_committed(i) for i in range(len(token_ids)))
    return ProvisionalBlock(start, draft.step - 1, tuple(token_ids), masked, tuple(confidences))


def draft_on_device(start: int, steps: int, kept: _Kept) -> ProvisionalBlock:
    """A draft after so many steps."""
    masked = tuple(step < 0 for step in kept.commit_steps)
    parts = tuple(kept.token_ids), masked, tuple(kept.confidences)
    return ProvisionalBlock(start, steps - 1, *parts)


class Drafting:
    """A block that is being denoised by `call`, and the latest of its drafts that nobody has taken:
    a slow reader misses those before it."""

    def __init__(
        self, call: Callable[[Watcher | None], Coroutine[Any, Any, Block]], *, watch: bool
    ) -> None:
        self._latest: ProvisionalBlock | None = None
        self._moved = asyncio.Event()
        self._task = asyncio.ensure_future(call(self._take if watch else None))
        if watch:
            self._task.add_done_callback(lambda _: self._moved.set())

    async def drafts(self) -> AsyncGenerator[ProvisionalBlock, None]:
        """Drafts as they come, until the block is done; only with `watch`."""
        while True:
            latest, self._latest = self._latest, None
            if latest is not None:
                yield latest
            elif self._task.done():
                return
            else:
                await self._moved.wait()
                self._moved.clear()

    async def block(self) -> Block:
        """The block. Raises what the call raised."""
        return await self._task

    async def end(self) -> None:
        """Gives the block up, if it is not done."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def _take(self, draft: ProvisionalBlock) -> None:
        self._latest = draft
        self._moved.set()
