"""Who chooses a pair: the service's own chooser, and one that knows everything."""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from types import SimpleNamespace
from typing import Any

from ray.serve._private.common import DeploymentHandleSource

from benchmarks.fleet.pairs import DEPLOYMENT, SimulatedPair, replica_of
from twotower.deployments.pair.tower_pair import Job
from twotower.deployments.routing.attempts import PairChooser
from twotower.deployments.routing.pairs import Pairs
from twotower.towers.request.params import GenerationParams

_PARAMS = GenerationParams()


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise RuntimeError("a coroutine waits in simulated time")


class ServiceChooser(PairChooser):
    """PairChooser over simulated pairs: asking a pair for the length of its queue takes no time."""

    # What Serve's router starts beside a choice: questions that have an answer at once.
    _event_loop = SimpleNamespace(create_task=run)

    def __init__(self, table: Pairs, clock: Any) -> None:
        super().__init__(
            DEPLOYMENT,
            DeploymentHandleSource.REPLICA,
            use_replica_queue_len_cache=True,
            get_curr_time_s=clock,
        )
        self._own = table

    @property
    def _table(self) -> Pairs:
        return self._own

    def update(self, pairs: Sequence[SimulatedPair]) -> None:
        """DOC"""
        self.update_replicas(list(pairs))

    def choose(self, row_id: str, prompt: tuple[int, ...]) -> SimulatedPair | None:
        """As Chooser: through the ranks, as Serve's router does."""
        job = Job(row_id, prompt, (), _PARAMS)
        pending = SimpleNamespace(args=[job])
        chosen = self._first(pending)
        if chosen is None:
            return None
        self.on_request_routed(pending, chosen.replica_id, None)
        self.on_send_request(chosen.replica_id)
        # The pair's own word for how many calls it has, with the call's acceptance.
        self.on_new_queue_len_info(chosen.replica_id, chosen.rows + 1)
        return chosen

    def ended(self, pair: SimulatedPair) -> None:
        """DOC"""
        self.decrement_queue_len_cache(pair.replica_id)

    def _first(self, pending: Any) -> SimulatedPair | None:
        if not self._replicas:
            return None
        for rank in run(self.choose_replicas(self._replicas_list, pending)):
            found = run(self._select_from_candidate_replicas(rank, 0))
            if found is not None and self._takes(found):
                return replica_of(found)
        return None

    def _takes(self, pair: SimulatedPair) -> bool:
        """False if the pair refuses, which sets the record right, or its process is gone."""
        if pair.state == "gone":
            self.on_replica_actor_died(pair.replica_id)
            return False
        if pair.state == "up" and pair.rows >= pair.max_ongoing_requests:
            self.on_new_queue_len_info(pair.replica_id, pair.rows)
            return False
        return True

    async def _probe_queue_lens(self, replicas: Any, backoff_index: int) -> Any:
        """A pair that is silent does not answer in time; the process of one that is gone has
        died."""
        del backoff_index
        answers: list[tuple[Any, int | None]] = []
        for pair in replicas:
            if pair.state == "gone":
                self.on_replica_actor_died(pair.replica_id)
            up = pair.state == "up"
            answers.append((pair, pair.rows if up else None))
            if up:
                self._replica_queue_len_cache.update(pair.replica_id, pair.rows)
        return answers
