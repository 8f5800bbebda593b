"""Pairs that come and go under a real service: the scenario's times, and that no stream notices."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from ray import serve

from benchmarks.autoscale import PROMPTS, scaling_config, scenario
from tests.support.nodes import deploy_anew
from tests.support.pairs import pair_states
from twotower.client import Client, ServiceError
from twotower.deployments.app import PAIR_DEPLOYMENT, build_app
from twotower.deployments.config import ServiceConfig
from twotower.deployments.pair.autoscaling import PairAutoscaling
from twotower.deployments.server.server import LocalService

TINY = Path(__file__).parents[1] / "golden" / "tiny_a"


def pair_deployment(**settings: object) -> serve.Deployment:
    config = ServiceConfig(model=str(TINY), max_num_seqs=4, max_queued_requests=10, **settings)
    router = build_app(config)._bound_deployment
    found: serve.Deployment = router.init_args[1]._bound_deployment
    assert found.name == PAIR_DEPLOYMENT
    return found


# Deprecated for environment variables that ray 2.60 does not heed.
@pytest.mark.filterwarnings("ignore:The `metrics_interval_s` field:DeprecationWarning")
def test_the_app_hands_the_policy_to_serve() -> None:
    autoscaling = PairAutoscaling(min_pairs=0, max_pairs=3, metrics_interval_s=5.0)
    pair = pair_deployment(autoscaling=autoscaling)
    made = pair._deployment_config.autoscaling_config
    assert (made.min_replicas, made.initial_replicas, made.max_replicas) == (0, 1, 3)
    assert made.policy.policy_function.endswith("ServePairScaling")
    assert made.policy.policy_kwargs["target_rows_per_pair"] == 3.0
    # All pairs together would take so many: rows, rows that wait, and room for questions.
    assert pair.max_queued_requests == 3 * pair.max_ongoing_requests == 3 * (4 + 10 + 64)
    short = PairAutoscaling(max_pairs=3, cold_start_queue=7)
    assert pair_deployment(autoscaling=short).max_queued_requests == 7


def test_a_fixed_number_of_pairs_has_no_policy() -> None:
    pair = pair_deployment(num_pairs=2)
    assert (pair.num_replicas, pair._deployment_config.autoscaling_config) == (2, None)


@pytest.fixture(scope="module")
def service() -> Iterator[LocalService]:
    """The shipped model with one pair, which may become three."""
    with LocalService(scaling_config(None, 3)) as running:
        yield running


@pytest.mark.cluster
@pytest.mark.filterwarnings("default")
def test_idle_burst_idle(service: LocalService) -> None:
    """1 -> 3 -> 1 pairs, the last step while rows run: they end with the tokens they have alone."""
    found = scenario(service, clients=20, tokens=64, tail_tokens=320, timeout_s=150)
    print(json.dumps(found))
    running = [level["running"] for level in found["pairs"]]
    wanted = [level["running"] + level["starting"] for level in found["pairs"]]
    assert (running[0], max(running), running[-1]) == (1, 3, 1)
    peak = wanted.index(3)
    assert wanted[: peak + 1] == sorted(wanted[: peak + 1]), "fewer pairs during the burst"
    assert wanted[peak:] == sorted(wanted[peak:], reverse=True), "more pairs after the burst"
    assert found["streams_wrong"] == 0
    assert found["streams_while_pairs_went"] > 0
    assert found["others_gone_after_s"] >= 4.0


@pytest.mark.cluster
@pytest.mark.filterwarnings("default")
def test_from_zero(service: LocalService) -> None:
    """Without a pair requests wait in the router as far as its queue goes, and wake one."""
    deploy_anew(scaling_config(None, 1, min_pairs=0, zero_after_s=2.0, cold_start_queue=4))
    with Client(service.address) as client:

        def ask(_: int) -> list[int]:
            stream = client.generate(PROMPTS[0], max_tokens=32, ignore_eos=True, timeout=150)
            return [token for block in stream for token in block.token_ids]

        alone = ask(0)
        asleep = awaited_pairs(0)
        begin = time.monotonic()
        with ThreadPoolExecutor(7) as pool:
            asked = [pool.submit(ask, number) for number in range(7)]
            answers, refused = [], []
            for one in asked:
                try:
                    answers.append(one.result())
                except ServiceError as error:
                    refused.append(error.code)
        print(json.dumps({"asleep_after_s": asleep, "cold_s": time.monotonic() - begin}))
        assert answers == [alone] * 4
        assert refused == [grpc.StatusCode.RESOURCE_EXHAUSTED] * 3


def awaited_pairs(count: int, timeout_s: float = 60.0) -> float:
    """Seconds until there are so many pairs, those that come or go included."""
    begin = time.monotonic()
    while sum(pair_states().values()) != count:
        assert time.monotonic() - begin < timeout_s, pair_states()
        time.sleep(0.1)
    return time.monotonic() - begin
