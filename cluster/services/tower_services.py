"""The calls of the towers of a pair, which proxies make and actors answer.

A call is a method of ContextTowerService or DenoiserTowerService, written once, which hands itself
to `_call`: for a proxy (`remote.py`) this is a remote call of its actor, for an actor (`actors.py`)
a call of its engine. A subclass overrides only the calls to which it adds something.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

from twotower.cluster.calls.messages import CallTypes
from twotower.towers.decoding.provisional import Drafting
from twotower.towers.decoding.services import (
    UNKNOWN_COSTS,
    Block,
    DraftCosts,
    DraftScores,
    Extended,
    Prefilled,
    ProvisionalBlock,
    Scores,
    Watcher,
)
from twotower.towers.engine.stats import EngineStats
from twotower.towers.request.params import GenerationParams

# A draft costs a message on each hop to the client, whatever a pass takes.
DRAFT_PERIOD_S = 0.15
P = ParamSpec("P")
T = TypeVar("T")
# A call of a service: its method, not bound to an object.
Call = Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]
# As well, answered by a stream.
StreamCall = Callable[Concatenate[Any, P], AsyncGenerator[T, None]]
Side = Literal["context", "denoiser"]


def bound(target: object, call: Call[P, T]) -> Callable[P, Coroutine[Any, Any, T]]:
    """The method of `target` that has the name and the types of `call`."""
    method: Callable[P, Coroutine[Any, Any, T]] = getattr(target, call.__name__)
    return method


class TowerService(ABC):
    """A tower that holds rows; guarantees as in `towers/decoding/services.py`."""

    @abstractmethod
    async def _call(self, call: Call[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Makes a call where the tower is."""

    async def release(self, row_id: str) -> None:
        """Frees everything that the row holds, or its place in the queue."""
        await self._call(TowerService.release, row_id)

    async def stats(self) -> EngineStats:
        """Counters of the tower's engine."""
        return await self._call(TowerService.stats)

    async def check(self) -> None:
        """Raises UnavailableError if the tower cannot serve."""
        await self._call(TowerService.check)


class ContextTowerService(TowerService):
    """A context tower with links to denoiser towers; fulfils `ContextService`."""

    async def open(self, row_id: str, capacity: int) -> int:
        """See `ContextService`; the row's state goes to denoiser tower 0."""
        return await self._call(ContextTowerService.open, row_id, capacity)

    async def open_for(self, row_id: str, capacity: int, denoiser: int) -> int:
        """As `open`; the row's state goes to denoiser tower number `denoiser`."""
        return await self._call(ContextTowerService.open_for, row_id, capacity, denoiser)

    async def move(self, row_id: str, denoiser: int) -> None:
        """Sends all of a row's state to a denoiser tower that has just opened the row, and every
        update from now on."""
        await self._call(ContextTowerService.move, row_id, denoiser)

    async def broken_links(self) -> list[int]:
        """Numbers of the denoiser towers whose links do not work any more."""
        return await self._call(ContextTowerService.broken_links)

    async def prefill(
        self, row_id: str, prompt: Sequence[int], generated: Sequence[int], params: GenerationParams
    ) -> Prefilled:
        """See `ContextService`."""
        return await self._call(ContextTowerService.prefill, row_id, prompt, generated, params)

    async def extend(
        self,
        row_id: str,
        token_ids: Sequence[int],
        params: GenerationParams,
        output: Sequence[int] = (),
    ) -> Extended:
        """See `ContextService`."""
        return await self._call(ContextTowerService.extend, row_id, token_ids, params, output)

    async def decode(
        self,
        row_id: str,
        count: int,
        params: GenerationParams,
        output: Sequence[int] = (),
        costs: DraftCosts = UNKNOWN_COSTS,
    ) -> Block:
        """See `ContextService`."""
        call = ContextTowerService.decode
        return await self._call(call, row_id, count, params, output, costs)

    async def update_mirror(self, row_id: str) -> None:
        """See `ContextService`."""
        await self._call(ContextTowerService.update_mirror, row_id)

    async def verify(
        self,
        row_id: str,
        draft: Sequence[int],
        params: GenerationParams,
        output: Sequence[int] = (),
        scores: DraftScores | None = None,
    ) -> Block:
        """See `ContextService`."""
        return await self._call(ContextTowerService.verify, row_id, draft, params, output, scores)

    async def score(self, token_ids: Sequence[int], top_logprobs: int = 0) -> Scores:
        """See `ContextService`."""
        return await self._call(ContextTowerService.score, token_ids, top_logprobs)


class DenoiserTowerService(TowerService):
    """A denoiser tower; fulfils `DenoiserService`."""

    async def open(self, row_id: str, capacity: int) -> None:
        """See `DenoiserService`."""
        await self._call(DenoiserTowerService.open, row_id, capacity)

    async def denoise_block(
        self,
        row_id: str,
        position: int,
        params: GenerationParams,
        known: Sequence[int] = (),
        output: Sequence[int] = (),
        watch: Watcher | None = None,
    ) -> Block:
        """See `DenoiserService`."""
        call = DenoiserTowerService.denoise_block
        return await self._call(call, row_id, position, params, known, output, watch)

    async def next_token(
        self,
        row_id: str,
        position: int,
        last_token: int,
        params: GenerationParams,
        output: Sequence[int] = (),
    ) -> Block:
        """See `DenoiserService`."""
        call = DenoiserTowerService.next_token
        return await self._call(call, row_id, position, last_token, params, output)

    async def watched_block(
        self,
        row_id: str,
        position: int,
        params: GenerationParams,
        known: Sequence[int],
        output: Sequence[int],
    ) -> AsyncGenerator[ProvisionalBlock | Block, None]:
        """Drafts of `denoise_block`, one every DRAFT_PERIOD_S at most, and last its block."""
        call = partial(self.denoise_block, row_id, position, params, known, output)
        drafts = Drafting(call, watched=True, period_s=DRAFT_PERIOD_S)
        async with aclosing(drafts) as drafting:
            async for draft in drafting:
                yield draft
            yield await drafting.block()


@dataclass(frozen=True)
class PairServices:
    """The towers of a pair, wherever they run; all denoisers as one, None if there is none."""

    context: ContextTowerService
    denoiser: DenoiserTowerService | None

    def by_name(self) -> dict[str, TowerService]:
        """The towers that there are, by name."""
        towers: dict[str, TowerService] = {"context": self.context}
        return towers if self.denoiser is None else {**towers, "denoiser": self.denoiser}


# Calls of rows, which come with every request or block. Others are few, or have answers without a
# bound, and stay tasks of the actor.
ROW_CALLS = CallTypes(
    [
        TowerService.release,
        ContextTowerService.open,
        ContextTowerService.open_for,
        ContextTowerService.move,
        ContextTowerService.prefill,
        ContextTowerService.extend,
        ContextTowerService.decode,
        ContextTowerService.update_mirror,
        ContextTowerService.verify,
        DenoiserTowerService.open,
        DenoiserTowerService.denoise_block,
        DenoiserTowerService.next_token,
    ]
)
