"""Where a pair's towers run: several denoisers, one process for both, the context tower alone."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from ray import serve

from tests.support.nodes import deploy_anew
from tests.support.pairs import await_no_rows, await_true, held
from tests.support.processes import own_processes
from twotower import TwoTower
from twotower.client import Client, ServiceError
from twotower.deployments.app import PAIR_DEPLOYMENT
from twotower.deployments.config import APP_NAME, ServiceConfig
from twotower.deployments.pair.tower_pair import Job
from twotower.deployments.routing.attempts import attempt_id
from twotower.deployments.server.server import LocalService, free_port
from twotower.towers.decoding.services import Block, ProvisionalBlock
from twotower.towers.request.params import GenerationParams

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("default")]

DENOISERS = 2
MODES = ("mask_diffusion", "verified", "ar", "mock_ar")
REQUESTS: list[tuple[list[int], dict[str, Any]]] = [
    (
        list(range(5, 8 + 9 * index)),
        {
            "mode": MODES[index % 4],
            "max_tokens": 10 if MODES[index % 4] == "mock_ar" else 200,
            "confidence_threshold": 0.5,
            "temperature": 0.5 * (index % 3),
            "seed": index,
        },
    )
    for index in range(8)
]


@pytest.fixture(scope="module")
def service(tiny_text: Path) -> Iterator[LocalService]:
    """The service with two denoisers for one context tower, which get states over TLS."""
    config = ServiceConfig(
        model=str(tiny_text),
        grpc_port=free_port(),
        http_port=free_port(),
        num_threads=1,
        max_num_seqs=8,
        health_check_period_s=1.0,
        denoisers_per_context=DENOISERS,
        channel_tls=True,
    )
    with LocalService(config) as running:
        yield running


def place(service: LocalService, **settings: Any) -> None:
    """Replaces the service's pair by one that is placed otherwise."""
    deploy_anew(service.config.model_copy(update={"denoisers_per_context": 1, **settings}))


@pytest.fixture(scope="module")
def want(tiny_text: Path) -> list[list[int]]:
    """The tokens of each request alone, in one process."""
    model = TwoTower.from_pretrained(tiny_text)
    return [list(model.generate([prompt], **how)[0].token_ids) for prompt, how in REQUESTS]


def tokens(address: str, prompt: list[int], how: dict[str, Any]) -> list[int]:
    with Client(address) as client:
        stream = client.generate(prompt, ignore_eos=True, **how)
        return [token for block in stream for token in block.token_ids]


def begun(address: str, pool: ThreadPoolExecutor) -> list[Future[list[int]]]:
    return [pool.submit(tokens, address, prompt, how) for prompt, how in REQUESTS]


def assert_drafts_come_over_actors(want: list[list[int]]) -> None:
    """Asks the pair itself: drafts, then their block, and no row is left by one who leaves."""
    prompt, how = REQUESTS[0]
    params = GenerationParams(**how, provisional=True)
    asking = serve.get_deployment_handle(PAIR_DEPLOYMENT, APP_NAME).options(stream=True)
    try:
        items = list(asking.generate.remote(Job(attempt_id(), tuple(prompt), (), params)))
        leaving = asking.generate.remote(Job(attempt_id(), tuple(prompt), (), params))
        assert isinstance(next(iter(leaving)), ProvisionalBlock)
        leaving.cancel()
    finally:
        # As in tests/support/pairs.py.
        asking.shutdown()
    blocks = [item for item in items if isinstance(item, Block)]
    assert [token for block in blocks for token in block.token_ids] == want[0]
    drafts = [item for item in items if isinstance(item, ProvisionalBlock)]
    # A reader on a busy machine may miss some.
    assert 0 < len(drafts) <= sum(block.nfe - 1 for block in blocks)
    await_true(lambda: held(1) == 0, "rows are left", timeout_s=8)


def test_a_killed_denoiser_is_started_again_in_its_place(
    service: LocalService, want: list[list[int]]
) -> None:
    """Twice, at random moments; the streams go on, on the same pair."""
    draw = random.Random(DENOISERS)
    contexts = own_processes("ray::ContextTowerActor")
    assert len(own_processes("ray::DenoiserTowerActor")) == DENOISERS
    for _ in range(2):
        with ThreadPoolExecutor(len(REQUESTS)) as pool:
            started = time.monotonic()
            streams = begun(service.address, pool)
            time.sleep(draw.uniform(0.2, 1.5))
            os.kill(draw.choice(own_processes("ray::DenoiserTowerActor")), signal.SIGKILL)
            assert [stream.result(timeout=120) for stream in streams] == want
            print(f"{DENOISERS} denoisers, one killed: {time.monotonic() - started:.1f} s")
        await_no_rows()
    assert own_processes("ray::ContextTowerActor") == contexts
    assert_drafts_come_over_actors(want)


def test_both_towers_in_one_process(service: LocalService, want: list[list[int]]) -> None:
    place(service, placement="colocated")
    assert len(own_processes("ray::ColocatedActor")) == 1
    assert not own_processes("ray::DenoiserTowerActor")
    with ThreadPoolExecutor(len(REQUESTS)) as pool:
        streams = begun(service.address, pool)
        assert [stream.result(timeout=120) for stream in streams] == want
    assert_drafts_come_over_actors(want)


def test_the_context_tower_alone_serves_what_needs_no_denoiser(
    service: LocalService, want: list[list[int]]
) -> None:
    place(service, placement="ar_only")
    assert not own_processes("ray::DenoiserTowerActor")
    for request, expected in zip(REQUESTS, want, strict=True):
        if request[1]["mode"] == "ar":
            assert tokens(service.address, *request) == expected
    with pytest.raises(ServiceError) as caught:
        tokens(service.address, *REQUESTS[0])
    assert caught.value.code == grpc.StatusCode.INVALID_ARGUMENT
    assert "mode: got 'mask_diffusion', expected ar, verified, auto alone" in str(caught.value)
    with Client(service.address) as client:
        assert client.model_info().modes == ("ar", "verified", "auto")
        assert client.score([5, 6, 7]).log_probs
