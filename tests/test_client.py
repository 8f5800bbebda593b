"""The client against a real gRPC server with a scripted service."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest

from twotower.client import AsyncClient, Client, ServiceError, Usage
from twotower.protos.v1 import generation_pb2 as pb
from twotower.protos.v1 import generation_pb2_grpc
from twotower.towers.errors import InvalidRequestError


class Scripted(generation_pb2_grpc.GenerationServicer):
    """Answers from a script and keeps what was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.breaks = False

    def Generate(self, request: Any, context: Any) -> Iterator[pb.GenerateResponse]:  # noqa: N802
        self.asked.append(request)
        yield pb.GenerateResponse(started=pb.Started(request_id="r", seed=7, prompt_tokens=2))
        block = pb.Block(index=0, start=2, token_ids=[4, 5], text="ab", log_probs=[-0.5, -0.25])
        yield pb.GenerateResponse(block=block)
        if self.breaks:
            context.abort(grpc.StatusCode.UNAVAILABLE, "a tower is gone")
        usage = pb.Usage(
            prompt_tokens=2,
            completion_tokens=2,
            nfe=3,
            context_passes=1,
            cached_tokens=4,
            accepted_tokens=5,
            drafted_tokens=6,
        )
        stop = next(iter(request.sampling_params.stop), None)
        complete = pb.Complete(finish_reason="stop", usage=usage, matched_stop=stop)
        yield pb.GenerateResponse(complete=complete)

    def Score(self, request: Any, context: Any) -> pb.ScoreResponse:  # noqa: N802
        self.asked.append(request)
        if not request.tokens.ids:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "input: got 0 tokens, expected 1")
        return pb.ScoreResponse(token_ids=request.tokens.ids, log_probs=[-0.5])

    def GetModelInfo(self, _request: Any, _context: Any) -> pb.ModelInfo:  # noqa: N802
        return pb.ModelInfo(name="m", vocab_size=9, modes=["ar"])


@pytest.fixture
def served() -> Iterator[tuple[Scripted, Client]]:
    service = Scripted()
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        generation_pb2_grpc.add_GenerationServicer_to_server(service, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        with Client(f"127.0.0.1:{port}") as client:
            yield service, client
        server.stop(grace=None).wait()


def test_a_stream(served: tuple[Scripted, Client]) -> None:
    service, client = served
    stream = client.generate("x", mode="ar", confidence_threshold=0.0, request_id="mine")
    text = "".join(block.text for block in stream)
    assert text == "ab"
    assert (stream.request_id, stream.seed, stream.prompt_tokens) == ("r", 7, 2)
    assert stream.token_ids == [4, 5]
    assert (stream.finish_reason, stream.usage) == ("stop", Usage(2, 2, 3, 1, 4, 5, 6))
    assert stream.matched_stop is None
    asked = service.asked[0]
    assert (asked.text, asked.request_id) == ("x", "mine")
    sent = {field.name for field, _ in asked.sampling_params.ListFields()}
    assert sent == {"mode", "confidence_threshold"}


def test_stopping_and_log_probabilities(served: tuple[Scripted, Client]) -> None:
    service, client = served
    stream = client.generate(
        "x", mode="verified", draft_steps=3, min_tokens=2, stop=["日", "b"], logprobs=True
    )
    assert [block.log_probs for block in stream] == [(-0.5, -0.25)]
    assert stream.log_probs == [-0.5, -0.25]
    assert stream.matched_stop == "日"
    asked = service.asked[0].sampling_params
    assert (asked.mode, asked.draft_steps, asked.min_tokens) == ("verified", 3, 2)
    assert (list(asked.stop), asked.logprobs) == (["日", "b"], True)


def test_one_string_is_no_list_of_stop_strings(served: tuple[Scripted, Client]) -> None:
    service, client = served
    with pytest.raises(InvalidRequestError, match="stop: got 'end', expected a list of strings"):
        client.generate("x", stop="end")
    assert service.asked == []


def test_a_broken_stream_keeps_what_a_resume_needs(served: tuple[Scripted, Client]) -> None:
    service, client = served
    service.breaks = True
    stream = client.generate([1, 2], resume=False)
    with pytest.raises(ServiceError, match="UNAVAILABLE: a tower is gone") as caught:
        list(stream)
    assert caught.value.code == grpc.StatusCode.UNAVAILABLE
    assert (stream.seed, stream.token_ids, stream.usage) == (7, [4, 5], None)
    service.breaks = False
    list(client.generate([1, 2], seed=stream.seed, generated_token_ids=stream.token_ids))
    assert list(service.asked[1].generated_token_ids) == [4, 5]
    assert service.asked[1].sampling_params.seed == 7


def test_ids_of_other_libraries(served: tuple[Scripted, Client]) -> None:
    service, client = served
    list(
        client.generate(
            np.array([[1, 2]]), generated_token_ids=np.array([3]), max_tokens=np.int8(4)
        )
    )
    assert client.score(np.array([3, 4])).token_ids == (3, 4)
    assert list(service.asked[0].tokens.ids) == [1, 2]
    assert list(service.asked[0].generated_token_ids) == [3]
    assert service.asked[0].sampling_params.max_tokens == 4
    for wrong in (np.array([1.0]), [True], [-1]):
        with pytest.raises(InvalidRequestError, match=r"^prompt\[0\]: got .*an id in 0"):
            client.generate(wrong)
        with pytest.raises(InvalidRequestError, match=r"^text\[0\]: got .*an id in 0"):
            client.score(wrong)
    assert len(service.asked) == 2


async def test_the_other_client_checks_ids_too() -> None:
    """Before it calls anybody."""
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(InvalidRequestError, match=r"^text\[0\]: got True"):
            await client.score([True])
        for prompt, generated in (([1.5], [1]), ([1], np.array([1.5]))):
            with pytest.raises(InvalidRequestError, match=r"\[0\]: got 1\.5, expected an id in 0"):
                client.generate(prompt, generated_token_ids=generated)


def test_unary_calls(served: tuple[Scripted, Client]) -> None:
    _, client = served
    assert client.score([3, 4]).log_probs == (-0.5,)
    with pytest.raises(ServiceError, match="INVALID_ARGUMENT: input"):
        client.score([])
    info = client.model_info()
    assert (info.name, info.vocab_size, info.eos_token_id) == ("m", 9, None)


def test_nobody_there() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(ServiceError, match="UNAVAILABLE"):
        client.model_info(timeout=10)
