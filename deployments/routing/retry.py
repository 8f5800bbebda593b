"""Retries of a request that was lost with its pair, and their limits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from twotower.cluster.services.ray_errors import plain_error
from twotower.protos.backoff import backoff_s
from twotower.towers.errors import QueueFullError, TwoTowerError, UnavailableError

_LOST = (UnavailableError, DeploymentUnavailableError, TimeoutError)
_FULL = (QueueFullError, BackPressureError)


class NoPairError(UnavailableError):
    """No pair has come up, or had room again, within the time that a request waits for one."""


class BrokenPairError(UnavailableError):
    """The attempt went to a pair that had lost others before, as there was no better one."""


class LostTooOftenError(TwoTowerError):
    """Every pair that took the request was lost with it: the request may be the reason."""


@dataclass(frozen=True)
class RetryPolicy:
    """Limits of a request's waits for a pair, and of its attempts.

    `resume_timeout_s` counts from a loss to the next committed block, or to the moment at which a
    pair is up that has the request in its queue. `max_attempts` are those in a row, the first
    included, that end without a new block and may have the request itself as their reason.
    """

    resume_timeout_s: float
    max_attempts: int


class Losses:
    """The losses of a request since its last committed block."""

    def __init__(self, policy: RetryPolicy, clock: Callable[[], float] = time.monotonic) -> None:
        self._policy = policy
        self._clock = clock
        self._since: float | None = None
        self._admitted = False
        self._lost = 0
        self._tries = 0

    def forget(self) -> None:
        """A block has been committed."""
        self._since, self._admitted, self._lost, self._tries = None, True, 0, 0

    def queued(self) -> None:
        """A pair that is up has the request in its queue."""
        self._since, self._admitted = None, True

    async def pause(self, error: Exception) -> None:
        """Waits until the request may be tried again; a cancellation ends the wait. Raises as
        `wait_s`."""
        await asyncio.sleep(self.wait_s(error))

    def wait_s(self, error: Exception) -> float:
        """Seconds until the request may be tried again after a loss, which is noted.

        Raises `error` if it is none of a lost pair or if the resume timeout would pass, and
        LostTooOftenError after too many losses in a row. What a broken pair loses does not count,
        nor does a full queue, which a request waits for that has lost its pair or was moved: it has
        been admitted once.
        """
        plain = plain_error(error)
        full = isinstance(plain, _FULL) and self._admitted
        if isinstance(plain, NoPairError) or not (full or isinstance(plain, _LOST)):
            raise error
        self._admitted = True
        self._lost += not (full or isinstance(plain, BrokenPairError))
        self._tries += 1
        if self._lost >= self._policy.max_attempts:
            raise LostTooOftenError(
                f"the request was lost with {self._lost} pairs in a row and is not tried again"
            ) from error
        now = self._clock()
        self._since = now if self._since is None else self._since
        seconds = backoff_s(self._tries)
        if now + seconds - self._since > self._policy.resume_timeout_s:
            # Not the refusal itself: to a client that would mean that it was never admitted.
            raise NoPairError("no pair of towers has room; try again later") if full else error
        return seconds
