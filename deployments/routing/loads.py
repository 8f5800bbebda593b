"""The rows of every pair, as far as a router knows: what each has last reported, and its own since.

A report is seconds old, and other routers have sent rows since. They see the same reports and
follow the same rule, so each counts what it has sent itself as many times as there are routers: of
a pair that looks empty, each takes its part and not the whole.

Over arrays, as every request with a prompt asks for all pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from twotower.deployments.routing.affinity import SLACK_ROWS, SLACK_SHARE, Keys, pair_keys

# Counters of a pair, by tower and by name.
Report = Mapping[str, Mapping[str, float]]


class Loads:
    """Rows by the indices of the pairs that are present; for one thread at a time.

    `keys` are the pairs' keys for rendezvous hashing. `num_routers` send rows, this one included.
    """

    def __init__(self) -> None:
        self.num_routers = 1
        self._pairs: tuple[str, ...] = ()
        self._index: dict[str, int] = {}
        self.keys: Keys = pair_keys(())
        # This router's rows now and when the pair last reported, all rows and those of them that
        # waited then, and when the report came.
        self._own: NDArray[np.float64] = np.zeros(0)
        self._then: NDArray[np.float64] = np.zeros(0)
        self._reported: NDArray[np.float64] = np.zeros(0)
        self._queued: NDArray[np.float64] = np.zeros(0)
        self._came: NDArray[np.float64] = np.zeros(0)
        # When each pair read the counters that it last reported, by its own clock.
        self._read_at: dict[str, float] = {}

    def present(self, pairs: tuple[str, ...], own: Mapping[str, int]) -> None:
        """These are the pairs, with this router's rows on some; nothing is reported of new ones."""
        before = {pair: self._index[pair] for pair in pairs if pair in self._index}
        self._pairs, self.keys = pairs, pair_keys(pairs)
        self._index = {pair: index for index, pair in enumerate(pairs)}
        self._read_at = {pair: at for pair, at in self._read_at.items() if pair in before}
        old, new = list(before.values()), [self._index[pair] for pair in before]
        for name in ("_then", "_reported", "_queued", "_came"):
            found = np.zeros(len(pairs))
            found[new] = getattr(self, name)[old]
            setattr(self, name, found)
        self._own = np.array([own.get(pair, 0) for pair in pairs], dtype=np.float64)

    def reported(self, reports: Mapping[str, Report], now: float) -> None:
        """Takes what pairs have last said, by `now`: the rows of their context towers."""
        for pair, report in reports.items():
            index, context = self._index.get(pair), report.get("context", {})
            rows, read_at = context.get("rows"), context.get("clock_seconds", math.nan)
            if index is None or rows is None or read_at == self._read_at.get(pair, math.nan):
                # Said again, with news of another pair: own rows have come and gone since.
                continue
            self._read_at[pair] = read_at
            self._reported[index] = rows
            self._then[index] = self._own[index]
            self._queued[index] = context.get("queued_rows", 0)
            self._came[index] = now

    def count(self, pair: str, rows: int) -> None:
        """This router has so many rows on a pair now."""
        index = self._index.get(pair)
        if index is not None:
            self._own[index] = rows

    def fits(self) -> NDArray[np.bool_]:
        """For each pair, whether it has about as many rows as the others, or fewer, and none that
        wait."""
        rows = self._rows()
        limit = rows.mean() * (1.0 + SLACK_SHARE) + SLACK_ROWS if len(rows) else 0.0
        idle: NDArray[np.bool_] = self._queued == 0
        return idle & (rows <= limit)

    def queued_since(self, pair: str, at: float) -> float:
        """The rows that wait, if a pair has reported any after a time, else 0."""
        index = self._index.get(pair)
        if index is None or self._came[index] <= at:
            return 0.0
        return float(self._queued[index])

    def queued(self) -> float:
        """Rows that wait in all pairs."""
        return float(self._queued.sum())

    def free(self, places: int) -> NDArray[np.float64]:
        """For each pair that has `places`, those that are free, and 0 where rows wait."""
        return np.where(self._queued == 0, np.maximum(places - self._rows(), 0.0), 0.0)

    def _rows(self) -> NDArray[np.float64]:
        since = self._own - self._then
        return self._reported + np.where(since > 0, since * self.num_routers, since)

    def among(self, pairs: Sequence[str]) -> NDArray[np.bool_]:
        """For each pair, whether it is one of these."""
        found = np.zeros(len(self._pairs), dtype=bool)
        found[[self._index[pair] for pair in pairs]] = True
        return found
