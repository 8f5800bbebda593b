"""Counts of a running job, gathered in one actor from the processes that make its calls."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError


class _Counts:
    """Sums of what was counted. Runs as an actor."""

    def __init__(self) -> None:
        self._sums: Counter[str] = Counter()

    def add(self, counts: dict[str, int]) -> None:
        self._sums.update(counts)

    def sums(self) -> dict[str, int]:
        return dict(self._sums)


class JobMeter:
    """Takes counts from any process (fulfils `data.counts.Meter`), and gives their sums to the one
    that made it. Its counts are for eyes: a caller that dies takes its last second with it."""

    def __init__(self) -> None:
        self._actor: Any = ray.remote(num_cpus=0)(_Counts).remote()
        self._last: dict[str, int] = {}

    def add(self, **counts: int) -> None:
        """Adds counts; does not wait."""
        self._actor.add.remote(counts)

    def sums(self, timeout_s: float = 1.0) -> dict[str, int]:
        """The sums so far; those of the last time if the actor does not answer in time."""
        with suppress(RayError):
            self._last = ray.get(self._actor.sums.remote(), timeout=timeout_s)
        return self._last
