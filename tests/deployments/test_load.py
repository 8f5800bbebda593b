"""More requests than there is room for, and a new config under running streams."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.nodes import redeploy
from tests.support.pairs import await_no_rows
from twotower import TwoTower
from twotower.client import Client, GenerationStream, ServiceError
from twotower.deployments.config import ServiceConfig
from twotower.deployments.pair.overload import NOTCHES
from twotower.deployments.server.server import LocalService, free_port

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("default")]

PROMPTS = [list(range(5 + number, 9 + 3 * number)) for number in range(8)]
HOW: dict[str, Any] = {"max_tokens": 48, "confidence_threshold": 0.5, "seed": 3}
# Denoiser passes of a block, and the fewest that every other request allows; quarters between.
STEPS, FLOOR = 16, 4


@pytest.fixture(scope="module")
def service(tiny_text: Path) -> Iterator[LocalService]:
    config = ServiceConfig(
        model=str(tiny_text),
        grpc_port=free_port(),
        http_port=free_port(),
        num_threads=1,
        cpus_per_tower=0.1,
        health_check_period_s=1.0,
        max_num_seqs=8,
        max_queued_requests=40,
    )
    with LocalService(config) as running:
        yield running


def expected(folder: Path, steps: int = STEPS) -> list[list[int]]:
    model = TwoTower.from_pretrained(folder)
    results = (model.generate([prompt], steps_per_block=steps, **HOW)[0] for prompt in PROMPTS)
    return [list(result.token_ids) for result in results]


def received(client: Client, number: int, **floors: int) -> GenerationStream:
    """A stream that has been read to its end."""
    prompt = PROMPTS[number % len(PROMPTS)]
    stream = client.generate(prompt, ignore_eos=True, steps_per_block=STEPS, **floors, **HOW)
    assert [token for block in stream for token in block.token_ids] == stream.token_ids
    return stream


def test_two_hundred_streams_against_a_queue_limit(service: LocalService, tiny_text: Path) -> None:
    """Each ends complete and correct, or refused with a hint when to come again.

    Every other one allows fewer steps: it is served with fewer while others wait, and its tokens
    are those that it gets alone with the steps that its stream reports.
    """
    served = range(FLOOR, STEPS + 1, (STEPS - FLOOR) // NOTCHES)
    want = {steps: expected(tiny_text, steps) for steps in served}
    together = threading.Barrier(200)

    def ask(number: int) -> str:
        with Client(service.address) as client:
            together.wait(timeout=60)
            floors = {"min_steps_per_block": FLOOR} if number % 2 else {}
            try:
                stream = received(client, number, **floors)
            except ServiceError as error:
                hinted = error.retry_after_s is not None
                return f"{error.code.name}, {'with' if hinted else 'without'} a hint"
            steps = stream.steps_per_block if number % 2 else STEPS
        assert steps is not None
        right = stream.token_ids == want[steps][number % len(PROMPTS)]
        return f"complete, {steps} steps" if right else "wrong"

    with ThreadPoolExecutor(200) as pool:
        outcomes = Counter(pool.map(ask, range(200), timeout=240))
        print(f"200 streams at once, 8 places, a queue of 40: {dict(outcomes)}")
    await_no_rows()
    refused = outcomes.pop("RESOURCE_EXHAUSTED, with a hint")
    complete = {f"complete, {steps} steps" for steps in served}
    assert set(outcomes) <= complete
    assert {f"complete, {FLOOR} steps", f"complete, {STEPS} steps"} <= set(outcomes)
    assert outcomes.total() >= 48
    assert outcomes.total() + refused == 200


def test_a_new_config_fails_no_request(service: LocalService, tiny_text: Path) -> None:
    """Routers and pairs are replaced one after the other under six clients that never stop."""
    want = expected(tiny_text)
    config = service.config.model_copy(update={"num_pairs": 2})
    redeploy(config)
    done = threading.Event()

    def ask_on(worker: int) -> tuple[int, float]:
        count, longest = 0, 0.0
        while not done.is_set():
            began = time.monotonic()
            with Client(service.address) as client:
                stream = received(client, worker + count)
                assert stream.token_ids == want[(worker + count) % len(PROMPTS)]
            longest = max(longest, time.monotonic() - began)
            count += 1
        return count, longest

    with ThreadPoolExecutor(6) as pool:
        workers = [pool.submit(ask_on, worker) for worker in range(6)]
        time.sleep(2.0)
        began = time.monotonic()
        changed = config.model_copy(update={"max_context": 4096, "prefix_cache_mib": 8})
        try:
            redeploy(changed)
            seconds = time.monotonic() - began
            time.sleep(2.0)
        finally:
            done.set()
        results = [worker.result(timeout=120) for worker in workers]
        with Client(service.address) as client:
            assert client.model_info().max_context == 4096
        print(
            f"updated in {seconds:.1f} s under {sum(count for count, _ in results)} requests, the "
            f"slowest took {max(longest for _, longest in results):.1f} s"
        )
        await_no_rows()
