"""Proxies of towers in other processes.

Calls of rows go over one gRPC stream to each process (`cluster/calls`), others as tasks of its
actor.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, TypeVar

import ray

from twotower.cluster.calls.stream import CallStream
from twotower.cluster.channel.grpc import LinkSpec
from twotower.cluster.services.ray_errors import detached, plainly
from twotower.cluster.services.tower_services import (
    ROW_CALLS,
    Call,
    ContextTowerService,
    DenoiserTowerService,
    P,
    Side,
    StreamCall,
    TowerService,
)
from twotower.cluster.services.watch import Watch
from twotower.towers.decoding.services import Block, Watcher
from twotower.towers.engine.stats import EngineStats
from twotower.towers.errors import UnavailableError
from twotower.towers.request.params import GenerationParams

T = TypeVar("T")


class _Remote(TowerService):
    """The proxy of an actor; `side` says which tower of a ColocatedActor. `calls` are those of its
    process, once there are any."""

    def __init__(
        self, actor: Any, side: Side | None = None, calls: CallStream | None = None
    ) -> None:
        self._actor = actor
        self._side = side
        self.calls = calls
        self._ending: set[asyncio.Task[None]] = set()

    async def load(self) -> None:
        """Loads the tower. Raises CheckpointError, DeviceError."""
        await plainly(self._actor.load.remote())
        self.calls = CallStream(await plainly(self._actor.answer_calls.remote()), ROW_CALLS)
        # A tower whose calls do not arrive is found now, and not by its first row.
        await self.calls.open()

    async def close(self) -> None:
        """Ends the stream of calls; those that wait fail."""
        if self.calls is not None:
            await self.calls.close()

    async def release(self, row_id: str) -> None:
        """Frees the row, even if the request that asks for it is cancelled."""
        await detached(lambda: self._released(row_id))

    async def check(self) -> None:
        """Raises UnavailableError if the tower cannot serve, or its calls do not arrive."""
        await super().check()
        if self.calls is not None:
            await self.calls.open()

    async def _opened(self, row_id: str, opening: Coroutine[Any, Any, T]) -> T:
        """Waits until a row is open. If this is cancelled, the row is released once that call has
        ended as well: a tower may run a release before the call that was sent ahead of it, and
        then nobody else knows of the row."""
        call = asyncio.ensure_future(opening)
        try:
            return await asyncio.shield(call)
        except asyncio.CancelledError:
            ending = asyncio.create_task(
                self._release_after(call, row_id), context=contextvars.Context()
            )
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)
            raise

    async def _release_after(self, call: asyncio.Future[T], row_id: str) -> None:
        await asyncio.gather(call, return_exceptions=True)
        # A tower that is gone has nothing to release.
        await asyncio.gather(self.release(row_id), return_exceptions=True)

    async def _released(self, row_id: str) -> None:
        try:
            await self._call(TowerService.release, row_id)
        except UnavailableError:
            # With the stream alone, the row would stay; with its tower, this fails as well.
            await self._task(TowerService.release, row_id)

    async def _call(self, call: Call[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        if self.calls is None or not self.calls.carries(call.__qualname__):
            return await self._task(call, *args, **kwargs)
        assert not kwargs, "messages have arguments by position"
        answer: T = await self.calls.make(self._side, call.__qualname__, args)
        return answer

    async def _task(self, call: Call[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Makes a call as a task of the actor."""
        if self._side is not None:
            sent = self._actor.call.remote(self._side, call, *args, **kwargs)
        else:
            sent = getattr(self._actor, call.__name__).remote(*args, **kwargs)
        answer: T = await plainly(sent)
        return answer

    async def _stream(
        self, call: StreamCall[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> AsyncGenerator[T, None]:
        """Makes a call that answers by a stream."""
        name = call.__name__ if self._side is None else "stream"
        method = getattr(self._actor, name).options(num_returns="streaming")
        head = () if self._side is None else (self._side, call)
        async for sent in method.remote(*head, *args, **kwargs):
            yield await plainly(sent)


class RemoteContext(_Remote, ContextTowerService):
    """A context tower in another process, which is ended if it hangs."""

    def __init__(
        self, actor: Any, side: Side | None = None, calls: CallStream | None = None
    ) -> None:
        super().__init__(actor, side, calls)
        self._watch = Watch(partial(ray.kill, actor))

    async def open(self, row_id: str, capacity: int) -> int:
        return await self._opened(row_id, super().open(row_id, capacity))

    async def open_for(self, row_id: str, capacity: int, denoiser: int) -> int:
        return await self._opened(row_id, super().open_for(row_id, capacity, denoiser))

    async def connect(self, denoiser: int, link: LinkSpec) -> None:
        """Links the tower to a denoiser tower, in place of the link to it that was there.

        Raises LinkTestError if the link's transport does not carry states."""
        await plainly(self._actor.connect.remote(denoiser, link))

    async def broken_links(self) -> list[int]:
        return await self._watch.answer(super().broken_links())

    async def stats(self) -> EngineStats:
        return await self._watch.answer(super().stats())

    async def check(self) -> None:
        await self._watch.answer(super().check())


class RemoteDenoiser(_Remote, DenoiserTowerService):
    """A denoiser tower in another process."""

    async def open(self, row_id: str, capacity: int) -> None:
        await self._opened(row_id, super().open(row_id, capacity))

    async def denoise_block(
        self,
        row_id: str,
        position: int,
        params: GenerationParams,
        known: Sequence[int] = (),
        output: Sequence[int] = (),
        watch: Watcher | None = None,
    ) -> Block:
        if watch is None:
            return await super().denoise_block(row_id, position, params, known, output)
        call = DenoiserTowerService.watched_block
        async with aclosing(self._stream(call, row_id, position, params, known, output)) as items:
            async for item in items:
                if isinstance(item, Block):
                    return item
                watch(item)
        raise UnavailableError("a stream of drafts ended without its block")

    async def listen(self, token: str) -> LinkSpec:
        """Starts the engine and waits for its link; returns what the link needs, as epoch 0."""
        link: LinkSpec = await plainly(self._actor.listen.remote(token))
        return link
