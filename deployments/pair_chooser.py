"""How Serve chooses a pair for a call: the shorter queue of two, among those that work.

Serve pickles this module by value, so it imports little, and shared state lives elsewhere.
"""

from __future__ import annotations

import random
from typing import Any

from ray.serve.request_router import FIFOMixin, RequestRouter

from twotower.deployments import breaker

CHOICES = 2


class PairChooser(FIFOMixin, RequestRouter):  # type: ignore[misc]
    """Serve's own rule, power of two choices, with `breaker.PAIRS` asked before it."""

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: Any = None
    ) -> list[list[Any]]:
        """Replicas to ask for their queue's length, in ranks."""
        named = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        ranks = breaker.PAIRS.ranked(list(named), probe=_row_id(pending_request) is not None)
        chosen = [random.sample(rank, min(CHOICES, len(rank))) for rank in ranks]
        return [[named[pair] for pair in rank] for rank in chosen]

    def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:
        """Notes which pair has an attempt."""
        del result
        row_id = _row_id(pending_request)
        if row_id is not None:
            breaker.PAIRS.routed(row_id, replica_id.unique_id)


def _row_id(request: Any) -> str | None:
    """The row of a call that generates; other calls have none."""
    if request is None or not request.args:
        return None
    row_id: str | None = getattr(request.args[0], "row_id", None)
    return row_id
