"""The nginx front before a fake gRPC service; HTTP is in test_nginx_http.py."""

from __future__ import annotations

import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.nginx import KSERVE_LIVE, NEEDS_NGINX, NGINX, WAIT_S, Front, running
from twotower.protos.v1 import generation_pb2 as pb
from twotower.protos.v1 import generation_pb2_grpc

pytestmark = NEEDS_NGINX


@pytest.fixture
def front(tmp_path: Path) -> Iterator[Front]:
    with running(Front(tmp_path)) as started:
        yield started


def asked(tokens: int, **params: Any) -> pb.GenerateRequest:
    sampling = pb.SamplingParams(max_tokens=tokens, **params)
    return pb.GenerateRequest(request_id="r", sampling_params=sampling)


def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    error: Any = caught.value
    return error.code(), error.details()


def test_the_file_is_valid_without_a_warning(tmp_path: Path) -> None:
    config = str(Front(tmp_path).written())
    command = [str(NGINX), "-t", "-c", config, "-p", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode == 0, done.stderr
    assert "[warn]" not in done.stderr


def test_a_stream_arrives_message_by_message(front: Front) -> None:
    """The backend sends the next block only after the client has the one before."""
    with front.channel() as channel:
        stub = generation_pb2_grpc.GenerationStub(channel)
        call = stub.Generate(asked(20), timeout=WAIT_S)
        assert next(call).started == pb.Started(request_id="r", seed=7)
        for index in range(20):
            front.backend.next_block.release()
            assert next(call).block.index == index
        assert list(call) == []
        assert call.code() == grpc.StatusCode.OK


def test_many_streams_share_one_connection(front: Front) -> None:
    with front.channel() as channel:
        stub = generation_pb2_grpc.GenerationStub(channel)
        calls = [stub.Generate(asked(3), timeout=WAIT_S) for _ in range(6)]
        for call in calls:
            next(call)
        front.backend.next_block.release(18)
        assert [len(list(call)) for call in calls] == [3] * 6


def test_a_status_in_the_middle_of_a_stream_reaches_the_client(front: Front) -> None:
    front.backend.next_block.release(2)
    with front.channel() as channel:
        call = generation_pb2_grpc.GenerationStub(channel).Generate(asked(2, mode="full"))
        assert refused(call) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "queue: 256 rows wait already",
        )


def test_a_client_that_goes_is_noticed_behind_the_front(front: Front) -> None:
    with front.channel() as channel:
        call = generation_pb2_grpc.GenerationStub(channel).Generate(asked(5), timeout=WAIT_S)
        next(call)
        assert not front.backend.cancelled.is_set()
        call.cancel()
        assert front.backend.cancelled.wait(WAIT_S)


def test_health_is_let_through_and_all_else_is_not(front: Front) -> None:
    with front.channel() as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        for method in (
            "/ray.serve.RayServeAPIService/ListApplications",
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        ):
            call = channel.unary_stream(method)(b"", timeout=WAIT_S)
            assert refused(call) == (grpc.StatusCode.UNIMPLEMENTED, "unknown method")


def test_a_prompt_that_is_too_large_is_refused_by_the_front(front: Front) -> None:
    most, large = range(300_000), range(2_000_000)
    with front.channel() as channel:
        stub = generation_pb2_grpc.GenerationStub(channel)
        fits = stub.Score(pb.ScoreRequest(tokens=pb.TokenIds(ids=most)), timeout=WAIT_S)
        assert len(fits.token_ids) == len(most)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Score(pb.ScoreRequest(tokens=pb.TokenIds(ids=large)), timeout=WAIT_S)
    error: Any = caught.value
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == "the request is malformed or too large"


def test_one_address_has_so_many_streams_and_no_more(tmp_path: Path) -> None:
    own = Front(tmp_path)
    few = {"limit_conn streams 256": "limit_conn streams 2"}
    with running(own, **few), own.channel() as channel:
        stub = generation_pb2_grpc.GenerationStub(channel)
        held = [stub.Generate(asked(1), timeout=WAIT_S) for _ in range(2)]
        for call in held:
            next(call)
        third = stub.Generate(asked(1), timeout=WAIT_S)
        assert refused(third) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "too many streams from this address",
        )
        own.backend.next_block.release(2)
        assert [len(list(call)) for call in held] == [1, 1]


@pytest.mark.parametrize("method", [KSERVE_LIVE, "/twotower.v1.Generation/Score"])
def test_keys_pass_and_the_caller_is_named(front: Front, method: str) -> None:
    """What a client says of whom it comes from is replaced."""
    metadata = (("authorization", "Bearer tt-secret"), ("x-forwarded-for", "10.1.2.3"))
    request = pb.ScoreRequest(text="x").SerializeToString()
    with front.channel() as channel:
        channel.unary_unary(method)(request, metadata=metadata, timeout=WAIT_S)
    assert front.backend.metadata["authorization"] == "Bearer tt-secret"
    assert front.backend.metadata["x-forwarded-for"] == "127.0.0.1"
    assert "secret" not in front.logged(method)


def test_without_a_proxy_behind_it_the_front_is_unavailable(tmp_path: Path) -> None:
    own = Front(tmp_path)
    with running(own, with_backend=False), own.channel() as channel:
        call = generation_pb2_grpc.GenerationStub(channel).Generate(asked(1), timeout=WAIT_S)
        assert refused(call) == (
            grpc.StatusCode.UNAVAILABLE,
            "no proxy is up; try again later",
        )


def test_nothing_but_tls_is_spoken_and_no_text_is_logged(front: Front) -> None:
    with grpc.insecure_channel(f"localhost:{front.tls_port}") as channel:
        call = generation_pb2_grpc.GenerationStub(channel).Generate(asked(1), timeout=WAIT_S)
        assert refused(call)[0] == grpc.StatusCode.UNAVAILABLE
    with front.channel() as channel:
        request = pb.ScoreRequest(text="a secret prompt")
        generation_pb2_grpc.GenerationStub(channel).Score(request, timeout=WAIT_S)
    log = front.logged("/twotower.v1.Generation/Score")
    assert "200 grpc=0" in log
    assert "secret" not in log


def test_probes_without_grpc(front: Front) -> None:
    with urllib.request.urlopen(
        f"http://127.0.0.1:{front.plain_port}/healthz", timeout=WAIT_S
    ) as r:
        assert (r.status, r.read()) == (200, b"ok\n")
