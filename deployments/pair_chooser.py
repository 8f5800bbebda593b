"""How Serve chooses a pair for a call, among those that work: the one that has the prompt's
beginning, or the shorter queue of two.

Serve pickles this module by value, so it imports little, and shared state lives elsewhere.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from ray.serve.request_router import FIFOMixin, RequestRouter

from twotower.deployments import affinity, breaker

CHOICES = 2


class PairChooser(FIFOMixin, RequestRouter):  # type: ignore[misc]
    """Serve's own rule, power of two choices, after `breaker.PAIRS` and `affinity` were asked."""

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: Any = None
    ) -> list[list[Any]]:
        """Replicas to ask for their queue's length, in ranks."""
        named = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        row_id, prompt = _row_of(pending_request)
        ranks = breaker.PAIRS.ranked(list(named), probe=row_id is not None)
        chosen = [random.sample(rank, min(CHOICES, len(rank))) for rank in ranks]
        own = affinity.preferred_pair(prompt, ranks[-1], breaker.PAIRS.rows())
        if own is not None:
            # Behind a pair that is being probed, before the others.
            chosen.insert(len(chosen) - 1, [own])
        return [[named[pair] for pair in rank] for rank in chosen]

    def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:
        """Notes which pair has an attempt."""
        del result
        row_id, _ = _row_of(pending_request)
        if row_id is not None:
            breaker.PAIRS.routed(row_id, replica_id.unique_id)


def _row_of(request: Any) -> tuple[str | None, Sequence[int]]:
    """Name and prompt of a call that generates; other calls have none."""
    job = request.args[0] if request is not None and request.args else None
    return getattr(job, "row_id", None), getattr(job, "prompt", ())
