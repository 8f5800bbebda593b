"""How Serve chooses a pair for a call, among those that work: the one that a row moves to, or that
has the prompt's beginning, or the shorter queue of two.

Serve pickles this module by value, so it imports little, and shared state lives elsewhere.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from ray.serve.request_router import RequestRouter

from twotower.deployments.routing import affinity, pairs

CHOICES = 2


class PairChooser(RequestRouter):  # type: ignore[misc]
    """Serve's own rule, power of two choices, after `pairs.PAIRS` and `affinity` were asked.

    Without Serve's FIFOMixin, which would give the pair chosen for one call to the oldest that
    waits: here it matters which call gets which pair.
    """

    def update_replicas(self, replicas: list[Any]) -> None:
        """Notes which pairs there are: rows that wait may move to one that is new."""
        super().update_replicas(replicas)
        self._tell()

    def on_replica_actor_died(self, replica_id: Any) -> None:
        """Notes that a pair is gone."""
        super().on_replica_actor_died(replica_id)
        self._tell()

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: Any = None
    ) -> list[list[Any]]:
        """Replicas to ask for their queue's length, in ranks."""
        named = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        row_id, prompt = _row_of(pending_request)
        target = pairs.PAIRS.target_of(row_id) if row_id is not None else None
        # A row that is sent to a pair says nothing about another.
        probe = row_id is not None and target is None
        ranks = pairs.PAIRS.ranked(list(named), probe=probe)
        chosen = [random.sample(rank, min(CHOICES, len(rank))) for rank in ranks]
        own = affinity.preferred_pair(prompt, ranks[-1], pairs.PAIRS.rows())
        if own is not None:
            # Behind a pair that is being probed, before the others.
            chosen.insert(len(chosen) - 1, [own])
        if target is not None and target in ranks[-1]:
            chosen.insert(0, [target])
        return [[named[pair] for pair in rank] for rank in chosen]

    def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:
        """Notes which pair has an attempt."""
        del result
        row_id, _ = _row_of(pending_request)
        if row_id is not None:
            pairs.PAIRS.routed(row_id, replica_id.unique_id)

    def _tell(self) -> None:
        pairs.PAIRS.present([replica_id.unique_id for replica_id in self.curr_replicas])


def _row_of(request: Any) -> tuple[str | None, Sequence[int]]:
    """Name and prompt of a call that generates; other calls have none."""
    job = request.args[0] if request is not None and request.args else None
    return getattr(job, "row_id", None), getattr(job, "prompt", ())
