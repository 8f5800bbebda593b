"""Counts of what an actor has done, handed to a meter about once a second."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any, Protocol

from twotower.data.caller import Answer

EVERY_S = 1.0


class Meter(Protocol):
    """Takes what was done since the last call: `rows` that are finished, `errors` among them,
    `tokens` of output, `passes` of the denoiser, `context_passes`, and `retries` of requests. Rows
    of an actor that is lost are done, and counted, once more."""

    def add(self, **counts: int) -> None:
        """Adds to the totals. It must not block."""


class Counts:
    """Sums of an actor's counts. `meter` hears of them once a second, and when nothing is left to
    do. Belongs to one event loop."""

    def __init__(self, meter: Meter | None) -> None:
        self._meter = meter
        self._sums: Counter[str] = Counter()
        self._later: asyncio.TimerHandle | None = None

    def finished(self, answer: Answer | None, left: int) -> None:
        """Counts a row: its answer, None for an error without a request; `left` rows to do."""
        if self._meter is None:
            return
        self._sums.update(rows=1, errors=int(answer is None or not answer.ok))
        if answer is not None:
            self._sums.update(retries=max(0, answer.attempts - 1), **_costs(answer.body))
        if not left:
            self._tell()
        elif self._later is None:
            self._later = asyncio.get_running_loop().call_later(EVERY_S, self._tell)

    def _tell(self) -> None:
        if self._later is not None:
            self._later.cancel()
            self._later = None
        assert self._meter is not None
        self._meter.add(**self._sums)
        self._sums.clear()


def _costs(body: dict[str, Any]) -> dict[str, int]:
    usage = body.get("usage") or {}
    own = usage.get("twotower") or {}
    return {
        "tokens": usage.get("completion_tokens", 0),
        "passes": own.get("nfe", 0),
        "context_passes": own.get("context_passes", 0),
    }
