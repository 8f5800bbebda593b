"""What Serve is told to choose from, and what its own router makes of it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import (
    DeploymentHandleSource,
    DeploymentID,
    ReplicaID,
    RequestMetadata,
)
from ray.serve._private.request_router.common import PendingRequest

from tests.deployments.conftest import Clock
from tests.deployments.routing.test_affinity import prompt_of
from twotower.deployments.pair.tower_pair import Job
from twotower.deployments.routing import pairs as shared
from twotower.deployments.routing.affinity import SLACK_ROWS, STEP_TOKENS
from twotower.deployments.routing.attempts import PairChooser
from twotower.deployments.routing.pairs import CHOICES, Pairs
from twotower.deployments.routing.policy import FAILURES, REST_S, Room
from twotower.towers.request.params import GenerationParams

PAIRS = [f"pair-{number}" for number in range(5)]
DEPLOYMENT = DeploymentID("TowerPair", "app")
ONE = Room(1, 1)


class Replica:
    """A replica as Serve's router sees it, with so many calls in it."""

    def __init__(self, name: str, calls: int = 0) -> None:
        self.replica_id = ReplicaID(name, DEPLOYMENT)
        self.max_ongoing_requests = 10
        self.calls = calls
        self.routing_stats: dict[str, object] = {}

    async def get_queue_len(self, *, deadline_s: float) -> int:
        del deadline_s
        return self.calls


@pytest.fixture(autouse=True)
def pairs(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Pairs:
    found = Pairs(clock)
    monkeypatch.setattr(shared, "PAIRS", found)
    return found


def call(*arguments: object) -> Any:
    return SimpleNamespace(args=list(arguments))


def job_of(row_id: str, prompt: tuple[int, ...] = (5,)) -> Job:
    return Job(row_id, prompt, (), GenerationParams())


async def ranks(request: Any, names: list[str] = PAIRS) -> list[set[str]]:
    chooser = PairChooser(DEPLOYMENT, DeploymentHandleSource.REPLICA)
    replicas = [Replica(name) for name in names]
    chooser.update_replicas(replicas)
    chosen = await chooser.choose_replicas(replicas, request)
    return [{replica.replica_id.unique_id for replica in rank} for rank in chosen]


async def test_two_of_those_that_work(pairs: Pairs, clock: Clock) -> None:
    abc = ["a", "b", "c"]
    job = call(job_of("row-7"))
    assert [len(rank) for rank in await ranks(job, abc)] == [CHOICES]
    chooser = PairChooser.__new__(PairChooser)
    for _ in range(FAILURES):
        pairs.opened("row-7")
        chooser.on_request_routed(job, ReplicaID("a", DEPLOYMENT), None)
        pairs.lost("row-7")
    clock.now += REST_S
    for other in (call(), call([4, 5]), None):
        assert await ranks(other, abc) == [{"b", "c"}]
    assert await ranks(job, abc) == [{"a"}, {"b", "c"}]
    assert await ranks(job, abc) == [{"b", "c"}]


async def test_the_pair_of_a_prompt_comes_before_the_others(pairs: Pairs) -> None:
    prompt = tuple(prompt_of(4))
    first, second = await ranks(call(job_of("row", prompt)))
    assert (len(first), len(second)) == (1, 2)
    assert (await ranks(call(job_of("row", (*prompt, 7, 8)))))[0] == first
    assert len(await ranks(call(job_of("row", prompt[: STEP_TOKENS - 1])))) == 1
    for number in range(SLACK_ROWS + 3):
        pairs.opened(f"other-{number}")
        pairs.routed(f"other-{number}", *first)
    following, _ = await ranks(call(job_of("row", prompt)))
    assert len(following) == 1
    assert following != first


def send(pairs: Pairs, target: str) -> None:
    """Makes the row "moved" belong on a pair."""
    pairs.present(["full", target])
    for row in ("0", "1"):
        pairs.opened(row)
        pairs.routed(row, "full")
    assert pairs.moved("1", "moved", ONE)


async def test_a_row_that_moves_is_sent_to_its_pair_before_all_others(
    pairs: Pairs, clock: Clock
) -> None:
    prompt = tuple(prompt_of(4))
    (own,) = (await ranks(call(job_of("row", prompt))))[0]
    target = next(name for name in PAIRS if name != own)
    send(pairs, target)
    moved = call(job_of("moved", prompt))
    assert (await ranks(moved))[:2] == [{target}, {own}]
    assert {target} not in await ranks(call(job_of("another", prompt)))
    # A row whose way is known says nothing of a pair that is to be probed.
    broken = next(name for name in PAIRS if name not in (own, target))
    for number in range(FAILURES):
        pairs.opened(f"lost-{number}")
        pairs.routed(f"lost-{number}", broken)
        pairs.lost(f"lost-{number}")
    clock.now += REST_S
    assert {broken} not in await ranks(moved)
    assert {broken} in await ranks(call(job_of("another")))


async def test_a_pair_that_has_gone_or_loses_rows_is_nobodys_way(pairs: Pairs) -> None:
    send(pairs, PAIRS[0])
    assert len(await ranks(call(job_of("moved")))) == 2
    assert len(await ranks(call(job_of("moved")), PAIRS[1:])) == 1
    for number in range(FAILURES):
        pairs.opened(f"lost-{number}")
        pairs.routed(f"lost-{number}", PAIRS[0])
        pairs.lost(f"lost-{number}")
    assert len(await ranks(call(job_of("moved")))) == 1


async def test_serves_router_sends_a_row_its_way_and_tells_of_new_pairs(pairs: Pairs) -> None:
    chooser = PairChooser(DEPLOYMENT, DeploymentHandleSource.REPLICA)
    # The target has the longest queue, so that nothing else leads there.
    target, *others = replicas = [Replica("target", calls=9), *map(Replica, "abcd")]
    chooser.update_replicas(others)
    pairs.opened("0")
    pairs.routed("0", "full")
    pairs.opened("1")
    pairs.routed("1", "full")
    for replica in others:
        pairs.opened(f"on {replica.replica_id.unique_id}")
        pairs.routed(f"on {replica.replica_id.unique_id}", replica.replica_id.unique_id)
    assert not pairs.moved("1", "moved", ONE)
    chooser.update_replicas(replicas)
    assert pairs.moved("1", "moved", ONE)

    async def chosen(row_id: str) -> Any:
        metadata = RequestMetadata(row_id, row_id)
        request = PendingRequest([job_of(row_id)], {}, metadata)
        return await chooser._choose_replica_for_request(request)

    assert await chosen("moved") is target
    assert await chosen("another") is not target
    target.calls = target.max_ongoing_requests
    assert await chosen("moved") in others
    chooser.on_replica_actor_died(target.replica_id)
    pairs.opened("2")
    pairs.routed("2", "full")
    pairs.opened("3")
    pairs.routed("3", "full")
    assert not pairs.moved("3", "moved too", ONE)


async def test_each_call_gets_the_pair_that_was_chosen_for_it(pairs: Pairs) -> None:
    """Also when another call comes while the target is asked how long its queue is."""

    class Slow(Replica):
        async def get_queue_len(self, *, deadline_s: float) -> int:
            await asyncio.sleep(0.05)
            return await super().get_queue_len(deadline_s=deadline_s)

    chooser = PairChooser(
        DEPLOYMENT, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True
    )
    full, target = Replica("full", calls=9), Slow("target")
    chooser.update_replicas([full])
    # Serve asks a replica that it has just heard of how long its queue is.
    await asyncio.sleep(0.01)
    send(pairs, "target")
    chooser.update_replicas([full, target])

    async def chosen(row_id: str) -> Any:
        request = PendingRequest([job_of(row_id)], {}, RequestMetadata(row_id, row_id))
        return await chooser._choose_replica_for_request(request)

    moved = asyncio.create_task(chosen("moved"))
    await asyncio.sleep(0.01)
    others = [asyncio.create_task(chosen(f"another {number}")) for number in range(3)]
    assert await moved is target
    assert all(replica in (full, target) for replica in await asyncio.gather(*others))
