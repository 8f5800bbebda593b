"""A client's key: it goes with every call, and shows nowhere."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from twotower.client import AsyncClient, Client, ServiceError
from twotower.protos.v1 import generation_pb2 as pb
from twotower.protos.v1 import generation_pb2_grpc
from twotower.towers.errors import InvalidRequestError

KEY = "tt-verysecret"


class Guarded(generation_pb2_grpc.GenerationServicer):
    """Notes what each call is authorized by; breaks the first stream, so that it is resumed."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Any]] = []
        self.refuses = False

    def note(self, name: str, context: Any) -> None:
        self.seen.append((name, dict(context.invocation_metadata()).get("authorization")))
        if self.refuses:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "authorization: got an unknown key")

    def Generate(self, request: Any, context: Any) -> Iterator[pb.GenerateResponse]:  # noqa: N802
        self.note("Generate", context)
        yield pb.GenerateResponse(started=pb.Started(request_id="r", seed=7, prompt_tokens=1))
        if not request.generated_token_ids:
            yield pb.GenerateResponse(block=pb.Block(index=0, start=1, token_ids=[4], text="a"))
            context.abort(grpc.StatusCode.UNAVAILABLE, "a tower is gone")
        yield pb.GenerateResponse(complete=pb.Complete(finish_reason="stop"))

    def Score(self, _request: Any, context: Any) -> pb.ScoreResponse:  # noqa: N802
        self.note("Score", context)
        return pb.ScoreResponse(token_ids=[1])

    def GetModelInfo(self, _request: Any, context: Any) -> pb.ModelInfo:  # noqa: N802
        self.note("GetModelInfo", context)
        return pb.ModelInfo(name="m")


@pytest.fixture
def served() -> Iterator[tuple[Guarded, str]]:
    service = Guarded()
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        generation_pb2_grpc.add_GenerationServicer_to_server(service, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield service, f"127.0.0.1:{port}"
        server.stop(grace=None).wait()


EVERY_CALL = ["Generate", "Generate", "Score", "GetModelInfo"]


def call_everything(target: str, **options: Any) -> None:
    with Client(target, **options) as client:
        stream = client.generate([1])
        assert [block.text for block in stream] == ["a"]
        assert stream.resumes == 1
        client.score([1])
        client.model_info()


def test_every_call_and_every_resume_has_the_key(served: tuple[Guarded, str]) -> None:
    service, target = served
    call_everything(target, api_key=KEY)
    assert service.seen == [(name, f"Bearer {KEY}") for name in EVERY_CALL]


def test_without_a_key_there_is_no_header(served: tuple[Guarded, str]) -> None:
    service, target = served
    call_everything(target)
    assert service.seen == [(name, None) for name in EVERY_CALL]


async def test_the_client_of_asyncio(served: tuple[Guarded, str]) -> None:
    service, target = served
    async with AsyncClient(target, api_key=KEY) as client:
        stream = client.generate([1])
        assert [block.text async for block in stream] == ["a"]
        await client.score([1])
        await client.model_info()
        cancelled = client.generate([1])
        cancelled.cancel()
        with pytest.raises(ServiceError, match="CANCELLED"):
            await asyncio.wait_for(anext(aiter(cancelled)), 5)
    assert service.seen[:4] == [(name, f"Bearer {KEY}") for name in EVERY_CALL]


def test_a_refusal_reaches_the_caller_once(served: tuple[Guarded, str]) -> None:
    service, target = served
    service.refuses = True
    with Client(target, api_key=KEY) as client:
        assert "secret" not in repr(client) + repr(vars(client))
        for call in (lambda: list(client.generate([1])), lambda: client.score([1])):
            with pytest.raises(ServiceError, match=r"UNAUTHENTICATED.*unknown key") as caught:
                call()
            assert "secret" not in str(caught.value) + repr(caught.value)
    assert len(service.seen) == 2


@pytest.mark.parametrize("key", ["", "very secret", "sécret", "secret\n", b"secret", 7])
def test_a_key_that_no_header_holds_is_refused_and_not_repeated(key: Any) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(InvalidRequestError, match="api_key: got another text, exp") as caught:
            kind("127.0.0.1:1", api_key=key)
        assert "cret" not in str(caught.value)
