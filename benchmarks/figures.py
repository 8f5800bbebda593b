"""Rounded statistics of measured values."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable


def median(values: Iterable[float]) -> float:
    """Rounded median."""
    return round(statistics.median(values), 3)


def percentile(values: Iterable[float], percent: float) -> float:
    """The smallest value that `percent` of all do not exceed, rounded."""
    ordered = sorted(values)
    if not ordered or not 0 < percent <= 100:
        raise ValueError(
            f"percent: got {percent} of {len(ordered)} values, expected above 0 and at most 100 "
            "of at least 1"
        )
    return round(ordered[math.ceil(len(ordered) * percent / 100) - 1], 3)
