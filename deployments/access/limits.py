"""The limits of one key: requests at a time, and tokens a minute.

Tokens are a bucket that holds a minute's worth and fills steadily. How many a request takes is
known only while it runs, so it is let in as long as the bucket is not empty, and charged
afterwards: the level may go below zero, and the next request waits until it is positive again.
Over any time a caller gets at most what flows in, one full bucket, and what the requests of that
moment still take.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from types import TracebackType

from twotower.deployments.access.errors import RateLimitError

MINUTE_S = 60.0
# When a request ends is not known: a hint to come back soon.
CONCURRENCY_RETRY_S = 1.0
MOST_RETRY_S = 86400.0


class KeyLimits:
    """What the holder of one key uses, of how much; None is no limit.

    `clock` gives seconds and never goes back. Safe to use from several threads.
    """

    def __init__(
        self,
        name: str,
        max_concurrent: int | None = None,
        tokens_per_minute: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._max_concurrent = max_concurrent
        self._capacity = tokens_per_minute
        self._clock = clock
        self._level = float(tokens_per_minute or 0)
        self._filled_at = clock()
        self._running = 0
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """The name of the key."""
        return self._name

    @property
    def running(self) -> int:
        """Requests that are admitted and not released."""
        return self._running

    def admit(self) -> Admission:
        """Lets a request in; release what this returns, by `with` or by hand.

        Raises RateLimitError with the time after which to try again.
        """
        with self._lock:
            self._check_tokens()
            most = self._max_concurrent
            if most is not None and self._running >= most:
                text = f"key {self._name!r}: {self._running} requests run, expected at most {most}"
                raise RateLimitError(text, CONCURRENCY_RETRY_S)
            self._running += 1
        return Admission(self)

    def charge(self, tokens: int) -> None:
        """Takes tokens that have been used, more than there are if need be."""
        assert tokens >= 0, tokens
        if self._capacity is not None:
            with self._lock:
                self._fill(self._capacity)
                self._level -= tokens

    def leave(self) -> None:
        """Counts an admitted request as ended; `Admission.release` calls it once."""
        with self._lock:
            self._running -= 1

    def _check_tokens(self) -> None:
        if self._capacity is None:
            return
        self._fill(self._capacity)
        if self._level <= 0:
            text = f"key {self._name!r}: its {self._capacity} tokens a minute are used up"
            raise RateLimitError(text, self._seconds_to_positive(self._capacity))

    def _fill(self, capacity: int) -> None:
        now = self._clock()
        gained = (now - self._filled_at) * capacity / MINUTE_S
        self._level = min(float(capacity), self._level + gained)
        self._filled_at = now

    def _seconds_to_positive(self, capacity: int) -> float:
        """To a tenth of a second, and a little later: at zero itself nothing is admitted yet."""
        seconds = -self._level * MINUTE_S / capacity
        return min(MOST_RETRY_S, math.floor(seconds * 10 + 1.5) / 10)


class Admission:
    """A request that a key's limits have let in; leaving its `with` block releases it."""

    def __init__(self, limits: KeyLimits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._released = False

    @property
    def name(self) -> str:
        """The name of the key."""
        return self._limits.name

    def charge(self, tokens: int) -> None:
        """Counts tokens of the prompt or the output, as soon as they are known."""
        self._limits.charge(tokens)

    def release(self) -> None:
        """Makes room for another request; safe to call again."""
        with self._lock:
            if self._released:
                return
            self._released = True
        self._limits.leave()

    def __enter__(self) -> Admission:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()
