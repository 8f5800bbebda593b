"""Actors' handles as the services of `towers.protocols`, with their errors made plain."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import ray
from ray.exceptions import RayActorError, RayTaskError

from twotower.cluster.channel.grpc import LinkSpec
from twotower.cluster.services.watch import Watch
from twotower.towers.decoding.services import Block, ContextService, DenoiserService, Prefilled
from twotower.towers.errors import UnavailableError
from twotower.towers.request.params import GenerationParams

T = TypeVar("T")


class Watched(Protocol):
    """What a pair asks of a tower beside its work."""

    async def stats(self) -> dict[str, float]:
        """Counters of the tower's engine; `rows` is the number of rows that it holds."""

    async def check(self) -> None:
        """Raises UnavailableError if the tower cannot serve."""


class WatchedContext(ContextService, Watched, Protocol):
    """A context tower that can be watched."""


class WatchedDenoiser(DenoiserService, Watched, Protocol):
    """A denoiser tower that can be watched."""


@dataclass(frozen=True)
class PairServices:
    """The towers of a pair, wherever they run; all denoisers as one, None if there is none."""

    context: WatchedContext
    denoiser: WatchedDenoiser | None

    def watched(self) -> dict[str, Watched]:
        """The towers that there are, by name."""
        towers: dict[str, Watched] = {"context": self.context}
        return towers if self.denoiser is None else {**towers, "denoiser": self.denoiser}


def plain_error(error: BaseException) -> BaseException:
    """The error that user code raised, without Ray's wrapping; a dead actor is UnavailableError."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        return plain_error(cause) if isinstance(cause, BaseException) else error
    if isinstance(error, RayActorError):
        return UnavailableError("a tower or replica that held the request is gone; try again")
    return error


async def plainly(call: Awaitable[T]) -> T:
    """Awaits a remote call and raises its error as it was raised over there."""
    try:
        return await call
    except (RayTaskError, RayActorError) as error:
        raise plain_error(error) from None


async def detached(call: Callable[[], Awaitable[T]]) -> T:
    """Makes a remote call that the cancellation of the present request does not reach.

    Ray cancels what a cancelled task has called, found by a context variable: an empty context
    has none. Without this a release that was asked for in a `finally` may never run.
    """

    async def run() -> T:
        return await plainly(call())

    return await asyncio.create_task(run(), context=contextvars.Context())


class RemoteContext:
    """A ContextTowerActor's handle; fulfils ContextService.

    `process` is the actor whose process has the tower, if it is another: it is ended if it hangs.
    """

    def __init__(self, actor: Any, process: Any = None) -> None:
        self._actor = actor
        self._watch = Watch(partial(ray.kill, process or actor))

    async def load(self) -> None:
        """Loads the tower. Raises CheckpointError."""
        await plainly(self._actor.load.remote())

    async def connect(self, denoiser: int, link: LinkSpec) -> None:
        """Links the tower to a denoiser tower, in place of the link to it that was there."""
        await plainly(self._actor.connect.remote(denoiser, link))

    async def open(self, row_id: str, capacity: int) -> int:
        waiting: int = await plainly(self._actor.open.remote(row_id, capacity))
        return waiting

    async def open_for(self, row_id: str, capacity: int, denoiser: int) -> int:
        waiting: int = await plainly(self._actor.open_for.remote(row_id, capacity, denoiser))
        return waiting

    async def move(self, row_id: str, denoiser: int) -> None:
        await plainly(self._actor.move.remote(row_id, denoiser))

    async def broken_links(self) -> list[int]:
        asked = plainly(self._actor.broken_links.remote())
        broken: list[int] = await self._watch.answer(asked)
        return broken

    async def prefill(
        self, row_id: str, prompt: Sequence[int], generated: Sequence[int], params: GenerationParams
    ) -> Prefilled:
        call = self._actor.prefill.remote(row_id, list(prompt), list(generated), params)
        prefilled: Prefilled = await plainly(call)
        return prefilled

    async def extend(self, row_id: str, token_ids: Sequence[int]) -> int:
        passes: int = await plainly(self._actor.extend.remote(row_id, list(token_ids)))
        return passes

    async def decode(self, row_id: str, count: int, params: GenerationParams) -> Block:
        block: Block = await plainly(self._actor.decode.remote(row_id, count, params))
        return block

    async def verify(self, row_id: str, draft: Sequence[int], params: GenerationParams) -> Block:
        block: Block = await plainly(self._actor.verify.remote(row_id, list(draft), params))
        return block

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        scores: list[float] = await plainly(self._actor.score.remote(list(token_ids)))
        return scores

    async def release(self, row_id: str) -> None:
        await detached(lambda: self._actor.release.remote(row_id))

    async def stats(self) -> dict[str, float]:
        stats: dict[str, float] = await self._watch.answer(plainly(self._actor.stats.remote()))
        return stats

    async def check(self) -> None:
        await self._watch.answer(plainly(self._actor.check.remote()))


class RemoteDenoiser:
    """A DenoiserTowerActor's handle; fulfils DenoiserService."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def load(self) -> None:
        """Loads the tower. Raises CheckpointError."""
        await plainly(self._actor.load.remote())

    async def listen(self, token: str) -> str:
        """Starts the engine and waits for its link; returns the link's address."""
        address: str = await plainly(self._actor.listen.remote(token))
        return address

    async def open(self, row_id: str, capacity: int) -> None:
        await plainly(self._actor.open.remote(row_id, capacity))

    async def denoise_block(
        self,
        row_id: str,
        position: int,
        params: GenerationParams,
        known: Sequence[int] = (),
    ) -> Block:
        call = self._actor.denoise_block.remote(row_id, position, params, tuple(known))
        block: Block = await plainly(call)
        return block

    async def next_token(
        self, row_id: str, position: int, last_token: int, params: GenerationParams
    ) -> Block:
        call = self._actor.next_token.remote(row_id, position, last_token, params)
        block: Block = await plainly(call)
        return block

    async def release(self, row_id: str) -> None:
        await detached(lambda: self._actor.release.remote(row_id))

    async def stats(self) -> dict[str, float]:
        stats: dict[str, float] = await plainly(self._actor.stats.remote())
        return stats

    async def check(self) -> None:
        await plainly(self._actor.check.remote())
