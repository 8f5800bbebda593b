"""One request over as many pairs as it takes: no committed block is lost, repeated or changed.

An attempt is the request's prompt with the tokens committed so far, under a name of its own, on
whichever pair Serve chooses. When it is lost, what it may still send goes with its stream, and the
next attempt goes on from the log's end: random numbers belong to seed and position, so the tokens
are those of the undisturbed request.

An attempt that has not begun and has no place in its pair moves to one that has room, such as a new
pair that autoscaling has brought: that ends it too, but nothing was lost.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TypeVar

from ray.serve.exceptions import BackPressureError

from twotower.deployments.pair.tower_pair import Job
from twotower.deployments.routing.moves import Room
from twotower.deployments.routing.pair_client import PairClient
from twotower.deployments.routing.retry import Losses, NoPairError, RetryPolicy
from twotower.towers.decoding.commit_log import CommitLog
from twotower.towers.decoding.services import Block

logger = logging.getLogger("ray.serve")

# How often a row that has no block yet looks for a pair that has room.
LOOK_S = 1.0
PING_TIMEOUT_S = 5.0
LEAST_WAIT_S = 0.05
T = TypeVar("T")


def attempt_id() -> str:
    """A row's name that no other attempt at any request has had: 128 random bits."""
    return secrets.token_hex(16)


class _MovedError(Exception):
    """The attempt has ended here: the next one has a place in another pair."""


class Attempts:
    """Gives requests to pairs, and to other pairs when those are lost or others have room."""

    def __init__(self, pairs: PairClient, policy: RetryPolicy, room: Room) -> None:
        self._pairs = pairs
        self._policy = policy
        self._room = room

    async def blocks(self, job: Job, log: CommitLog) -> AsyncGenerator[Block, None]:
        """The job's blocks from the log's end on, in order.

        The caller commits each before it asks for the next. Raises what the pair raised if that
        is not a loss; UnavailableError if no pair came up in time; LostTooOftenError.
        """
        losses = Losses(self._policy)
        next_id = attempt_id()
        try:
            while True:
                try:
                    async with aclosing(self._read(job, next_id, losses)) as stream:
                        async for block in stream:
                            # A gap raises here: the attempt is lost, the next closes the gap.
                            if not log.has(block):
                                yield block
                                losses.forget()
                    return
                except _MovedError:
                    losses.queued()
                except Exception as error:
                    if log.finish_reason is not None:
                        # Lost after its last block: nothing is left to do.
                        return
                    await losses.pause(error)
                    logger.info("a request goes on at %d: %s", log.end, type(error).__name__)
                params = log.served(job.params)
                job = replace(job, row_id=next_id, generated=log.token_ids, params=params)
                next_id = attempt_id()
        finally:
            # One of them may have been promised a place that it never came to take.
            self._pairs.forget(job.row_id)
            self._pairs.forget(next_id)

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        """As TowerPair.score."""
        losses = Losses(self._policy)
        while True:
            try:
                return await self._while_a_pair_is_up(self._pairs.score(token_ids), losses)
            except Exception as error:
                await losses.pause(error)

    async def _read(self, job: Job, next_id: str, losses: Losses) -> AsyncGenerator[Block, None]:
        """The blocks of one attempt. Raises _MovedError if it moves before the first."""

        def look() -> None:
            if self._pairs.moved(job.row_id, next_id, self._room):
                raise _MovedError

        async with aclosing(self._pairs.generate(job)) as stream:
            block = await self._while_a_pair_is_up(anext(stream, None), losses, look)
            while block is not None:
                yield block
                block = await self._while_a_pair_is_up(anext(stream, None), losses)

    async def _while_a_pair_is_up(
        self, answer: Awaitable[T], losses: Losses, look: Callable[[], None] = lambda: None
    ) -> T:
        """The answer, however long a pair has the call in its queue.

        Serve itself waits for a pair without an end. Every LOOK_S, `look` may raise to end the
        wait. Raises NoPairError.
        """
        asking = asyncio.ensure_future(answer)
        clock = asyncio.get_running_loop().time
        period = max(self._policy.resume_timeout_s, LEAST_WAIT_S)
        check_at = clock() + period
        try:
            while True:
                await asyncio.wait([asking], timeout=min(LOOK_S, check_at - clock()))
                if asking.done():
                    return asking.result()
                look()
                if clock() >= check_at:
                    await self._check_up()
                    losses.queued()
                    check_at = clock() + period
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    async def _check_up(self) -> None:
        try:
            async with asyncio.timeout(PING_TIMEOUT_S):
                await self._pairs.ping()
        except BackPressureError:
            # The pairs are up, and busy.
            return
        except Exception as error:
            raise NoPairError("no pair of towers is up; try again later") from error
