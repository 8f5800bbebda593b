"""The whole service with two pairs, whose processes are killed under streams: no token is lost."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator

import pytest

from tests.support.chaos_cluster import PAIRS
from tests.support.pairs import left_over
from tests.support.processes import own_processes
from tests.support.streams import alone, disturbed, requests_of
from twotower import GenerationResult
from twotower.deployments.config import ServiceConfig
from twotower.deployments.server.server import LocalService, free_port

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("default")]

# Five requests of all modes, some of them drawn at a temperature.
REQUESTS = requests_of(5, tokens=64)
TITLES = {
    "a context tower": "ray::ContextTowerActor",
    "a denoiser tower": "ray::DenoiserTowerActor",
    "a pair": "ray::ServeReplica:twotower:TowerPair",
    "the router": "ray::ServeReplica:twotower:Router",
}


@pytest.fixture(scope="module")
def service() -> Iterator[LocalService]:
    config = ServiceConfig(
        num_pairs=PAIRS,
        grpc_port=free_port(),
        http_port=free_port(),
        num_threads=1,
        max_num_seqs=16,
        cpus_per_tower=0.1,
        health_check_period_s=1.0,
    )
    with LocalService(config) as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed() -> list[GenerationResult]:
    """What each request gives alone, in one process."""
    return alone(REQUESTS)


@pytest.mark.parametrize("victim", TITLES, ids=list(TITLES))
def test_a_death_under_ten_streams_changes_no_token(
    service: LocalService, undisturbed: list[GenerationResult], victim: str
) -> None:
    moments = random.Random(victim)
    requests = REQUESTS * 2

    def kill() -> None:
        os.kill(moments.choice(sorted(own_processes(TITLES[victim]))), signal.SIGKILL)

    begin = time.monotonic()
    received, running = disturbed(service.address, requests, moments, kill, timeout_s=120.0)
    seconds = time.monotonic() - begin
    longest = max(one.longest_pause_s for one in received)
    print(
        f"\n{victim} killed under {running} streams: longest pause "
        f"{longest:.2f} s, all in {seconds:.1f} s, "
        f"resumed by clients {sum(one.resumes for one in received)}"
    )
    assert running > 0
    for one, expected in zip(received, undisturbed * 2, strict=True):
        assert one.token_ids == expected.token_ids
        assert one.text == expected.text
        assert one.indexes == list(range(len(one.indexes)))
        assert one.starts[0] == 0
        assert one.starts == sorted(set(one.starts))
        assert one.usage is not None
        assert one.usage.completion_tokens == len(expected.token_ids)
        assert one.usage.nfe == expected.nfe
    assert left_over(PAIRS, timeout_s=60.0) == 0
