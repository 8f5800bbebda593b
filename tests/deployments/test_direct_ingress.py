"""Routers that listen themselves keep what the fronts promise, without a proxy before them."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx
import pytest

from tests.support.pairs import await_no_rows, await_true
from tests.support.processes import own_processes
from twotower import TwoTower
from twotower.client import Client, ServiceError
from twotower.deployments.config import ServiceConfig
from twotower.deployments.server.server import LocalService, free_port
from twotower.protos.v1 import generation_pb2 as pb
from twotower.protos.v1 import generation_pb2_grpc

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("default")]

ROUTER = "ray::ServeReplica:twotower:Router"
PROMPT = [5, 6, 7, 8]
LONG = 3000
MOST_BYTES = 64 << 10


def two_ports() -> int:
    """The first of two free ports in a row."""
    while True:
        first = free_port()
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", first + 1))
            except (OSError, OverflowError):
                continue
        return first


@pytest.fixture(scope="module")
def service(tiny_text: Path) -> Iterator[LocalService]:
    config = ServiceConfig(
        model=str(tiny_text),
        ingress="direct",
        grpc_port=two_ports(),
        http_port=two_ports(),
        num_routers=2,
        num_threads=1,
        max_num_seqs=4,
        max_message_bytes=MOST_BYTES,
        health_check_period_s=1.0,
    )
    with LocalService(config) as running:
        yield running


@pytest.fixture(scope="module")
def targets(service: LocalService) -> list[str]:
    """Where the two routers answer."""
    return [f"127.0.0.1:{service.config.grpc_port + number}" for number in range(2)]


def asked(max_tokens: int) -> pb.GenerateRequest:
    request = pb.GenerateRequest(tokens=pb.TokenIds(ids=PROMPT))
    request.sampling_params.max_tokens = max_tokens
    request.sampling_params.ignore_eos = True
    return request


def test_both_routers_give_the_tokens_of_the_model(targets: list[str], tiny_text: Path) -> None:
    alone = TwoTower.from_pretrained(tiny_text).generate([PROMPT], max_tokens=48)[0].token_ids

    def ask(target: str) -> list[int]:
        with Client(target) as own:
            stream = own.generate(PROMPT, max_tokens=48, ignore_eos=True, timeout=120)
            return [token for block in stream for token in block.token_ids]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(ask, targets)) == [alone, alone]


def test_http_is_on_the_routers_ports_too(service: LocalService) -> None:
    body = {"model": "m", "prompt": PROMPT, "max_tokens": 16, "ignore_eos": True}
    name = service.config.shown_name()
    for number in range(2):
        root = f"http://127.0.0.1:{service.config.http_port + number}"
        answer = httpx.post(f"{root}/v1/completions", json=body | {"model": name}, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 16
        # A path that is none is answered by the service and not by Serve.
        missing = httpx.get(f"{root}/nowhere", timeout=60)
        assert missing.status_code == 404
        assert missing.json()["error"]["type"] == "invalid_request_error"


def test_what_is_no_request_is_refused_in_the_services_words(
    service: LocalService, targets: list[str]
) -> None:
    with grpc.insecure_channel(targets[1]) as channel:
        call = channel.unary_stream("/twotower.v1.Generation/Generate")
        with pytest.raises(grpc.RpcError) as caught:
            list(call(b"\xff\xff", timeout=30))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "no message of this method" in caught.value.details()
        with pytest.raises(grpc.RpcError) as caught:
            list(call(bytes(MOST_BYTES + 1), timeout=30))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    url = f"http://127.0.0.1:{service.config.http_port}/v1/completions"
    answer = httpx.post(url, content=b"x" * (4 << 20), timeout=30)
    assert answer.status_code == 413


def test_a_client_that_leaves_and_a_deadline_free_their_rows(targets: list[str]) -> None:
    with grpc.insecure_channel(targets[0]) as channel:
        stub = generation_pb2_grpc.GenerationStub(channel)
        call = stub.Generate(asked(LONG), timeout=120)
        assert next(call).WhichOneof("event") == "started"
        assert next(call).WhichOneof("event") == "block"
        call.cancel()
        await_no_rows()
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(asked(LONG), timeout=0.5))
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await_no_rows()


def test_a_lost_router_comes_back_where_it_was(targets: list[str]) -> None:
    for router in own_processes(ROUTER):
        os.kill(router, signal.SIGKILL)

    def both_answer() -> bool:
        try:
            for target in targets:
                with Client(target) as client:
                    client.model_info(timeout=5)
        except ServiceError:
            return False
        return True

    await_true(both_answer, "the routers do not come back on their ports", timeout_s=90)
    await_no_rows()
