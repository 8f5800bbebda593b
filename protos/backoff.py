"""Waits before something is tried again: one schedule for the router and the client."""

from __future__ import annotations

import random
from collections.abc import Callable

FIRST_S = 0.1
LONGEST_S = 5.0


def backoff_s(tries: int, draw: Callable[[], float] = random.random) -> float:
    """Seconds to wait after `tries` failures in a row: 0.1, 0.2, 0.4 ... 5, less up to a half.

    The share that is left out is drawn anew each time, as calls that failed together would
    otherwise come back together.
    """
    # Beyond 2^16 the limit has long been reached.
    longest = min(LONGEST_S, FIRST_S * 2.0 ** min(tries - 1, 16))
    return longest * (1.0 - draw() / 2.0)
