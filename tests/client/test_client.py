"""The client against a real gRPC server with a scripted service."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
import pytest

from twotower.client import (
    AsyncClient,
    Client,
    ProvisionalBlock,
    ServiceError,
    TextBlock,
    Usage,
)
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
        block.drafted_by = "lookup"
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
            lookup_accepted_tokens=2,
            lookup_drafted_tokens=3,
        )
        stop = next(iter(request.sampling_params.stop), None)
        complete = pb.Complete(finish_reason="stop", usage=usage, matched_stop=stop)
        yield pb.GenerateResponse(complete=complete)

    def Score(self, request: Any, context: Any) -> pb.ScoreResponse:  # noqa: N802
        self.asked.append(request)
        if not request.tokens.ids:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "input: got 0 tokens, expected 1")
        tops = [pb.TopLogProbs(token_ids=[7], log_probs=[-0.25])] * bool(request.top_logprobs)
        return pb.ScoreResponse(token_ids=request.tokens.ids, log_probs=[-0.5], top_log_probs=tops)

    def Tokenize(self, request: Any, context: Any) -> pb.TokenizeResponse:  # noqa: N802
        if not request.text:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "text: no")
        return pb.TokenizeResponse(token_ids=list(request.text.encode()))

    def Detokenize(self, request: Any, _context: Any) -> pb.DetokenizeResponse:  # noqa: N802
        return pb.DetokenizeResponse(text=bytes(request.token_ids).decode())

    def GetModelInfo(self, _request: Any, _context: Any) -> pb.ModelInfo:  # noqa: N802
        return pb.ModelInfo(name="m", vocab_size=9, modes=["ar"])


@contextmanager
def listening(service: Scripted) -> Iterator[str]:
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        generation_pb2_grpc.add_GenerationServicer_to_server(service, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"127.0.0.1:{port}"
        server.stop(grace=None).wait()


@contextmanager
def serving(service: Scripted) -> Iterator[tuple[Scripted, Client]]:
    with listening(service) as address, Client(address) as client:
        yield service, client


@pytest.fixture
def served() -> Iterator[tuple[Scripted, Client]]:
    with serving(Scripted()) as pair:
        yield pair


def test_a_stream(served: tuple[Scripted, Client]) -> None:
    service, client = served
    stream = client.generate("x", mode="ar", confidence_threshold=0.0, request_id="mine")
    blocks = list(stream)
    assert [(block.text, block.drafted_by) for block in blocks] == [("ab", "lookup")]
    assert (stream.request_id, stream.seed, stream.prompt_tokens) == ("r", 7, 2)
    assert stream.token_ids == [4, 5]
    assert (stream.finish_reason, stream.usage) == ("stop", Usage(2, 2, 3, 1, 4, 5, 6, 2, 3))
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


class Drafting(Scripted):
    """Sends a draft before its block, and the most probable tokens."""

    def Generate(self, request: Any, context: Any) -> Iterator[pb.GenerateResponse]:  # noqa: N802
        for message in super().Generate(request, context):
            if message.HasField("block"):
                draft = pb.ProvisionalBlock(
                    start=2, step=1, token_ids=[4, 9], masked=[False, True], confidences=[1, 0.5]
                )
                yield pb.GenerateResponse(provisional=draft)
                for pairs in (((4, -0.5), (6, -1.0)), ((5, -0.25),)):
                    ids, log_probs = zip(*pairs, strict=True)
                    top = pb.TopLogProbs(token_ids=ids, log_probs=log_probs)
                    message.block.top_log_probs.append(top)
            yield message


TOPS = [((4, -0.5), (6, -1.0)), ((5, -0.25),)]


def test_drafts_and_the_most_probable_tokens() -> None:
    with serving(Drafting()) as (service, client):
        stream = client.generate(
            [1, 2],
            provisional=True,
            top_logprobs=2,
            presence_penalty=0.5,
            frequency_penalty=-1,
            logit_bias={7: 2, 3: -100},
        )
        draft, block = stream
        assert draft == ProvisionalBlock(2, 1, (4, 9), (False, True), (1.0, 0.5))
        assert isinstance(block, TextBlock)
        assert (block.token_ids, list(block.top_log_probs)) == ((4, 5), TOPS)
        assert (stream.token_ids, stream.top_log_probs) == ([4, 5], TOPS)
        asked = service.asked[0].sampling_params
        assert (asked.provisional, asked.top_logprobs) == (True, 2)
        assert (asked.presence_penalty, asked.frequency_penalty) == (0.5, -1.0)
        assert dict(asked.logit_bias) == {3: -100.0, 7: 2.0}


def test_texts_become_ids_and_back(served: tuple[Scripted, Client]) -> None:
    _, client = served
    assert client.tokenize("ab") == [97, 98]
    assert client.detokenize(np.array([[97, 98]])) == "ab"
    with pytest.raises(ServiceError, match="INVALID_ARGUMENT: text: no"):
        client.tokenize("")
    with pytest.raises(InvalidRequestError, match=r"token_ids\[1\]"):
        client.detokenize([1, -1])
    with pytest.raises(InvalidRequestError, match="text: got 3, expected a text"):
        client.tokenize(3)  # type: ignore[arg-type]


def test_a_score_with_the_most_probable_tokens(served: tuple[Scripted, Client]) -> None:
    service, client = served
    assert client.score([1, 2], top_logprobs=1).top_log_probs == (((7, -0.25),),)
    assert client.score([1, 2]).top_log_probs == ()
    assert [asked.HasField("top_logprobs") for asked in service.asked] == [True, False]


async def test_the_asyncio_client_asks_the_same() -> None:
    with listening(Scripted()) as address:
        async with AsyncClient(address) as other:
            assert await other.tokenize("ab") == [97, 98]
            assert await other.detokenize([97]) == "a"
            assert (await other.score([1, 2], 1)).top_log_probs == (((7, -0.25),),)


def test_one_string_is_no_list_of_stop_strings(served: tuple[Scripted, Client]) -> None:
    service, client = served
    with pytest.raises(InvalidRequestError, match="stop: got 'end', expected a list of strings"):
        client.generate("x", stop="end")
    assert service.asked == []


WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"max_tokens": 1 << 31},
        "max_tokens: got 2147483648, expected a whole number of at least -2147483648, at most 2147",
    ),
    ({"top_k": -(1 << 31) - 1}, "top_k: got -2147483649, expected a whole number of at least -2"),
    ({"seed": 1 << 63}, "seed: got 9223372036854775808, expected a whole number of at least -9"),
    ({"seed": 10**300}, "seed: got 1000000000"),
    ({"seed": 1.5}, "seed: got 1.5, expected a whole number"),
    ({"block_size": "16"}, "block_size: got '16', expected a whole number"),
    ({"draft_steps": True}, "draft_steps: got True, expected a whole number"),
    ({"temperature": 10**400}, "temperature: got 1000000"),
    ({"top_p": "0.5"}, "top_p: got '0.5', expected a number"),
    ({"logprobs": 2}, "logprobs: got 2, expected True or False"),
    ({"mode": "a\ud800"}, "mode[1]: got '\\ud800', expected text that can be encoded in UTF-8"),
    ({"mode": 3}, "mode: got 3, expected a text"),
    ({"first_token": True}, "first_token: got True, expected a text"),
    ({"mix_ratio": "0.5"}, "mix_ratio: got '0.5', expected a number"),
    ({"request_id": "\udfff"}, "request_id[0]: got '\\udfff', expected text"),
    ({"stop": ["a", "b\ud83d"]}, "stop[1][1]: got '\\ud83d', expected text"),
    ({"stop": [b"a"]}, "stop[0]: got b'a', expected a text"),
    ({"stop": None}, "stop: got None, expected a list of strings"),
    (
        {"generated_token_ids": [4, 1 << 31]},
        "generated_token_ids[1]: got 2147483648, expected an id",
    ),
    ({"generated_token_ids": [4, None]}, "generated_token_ids[1]: got None, expected an id"),
    ({"prompt": "x\ud800"}, "prompt[1]: got '\\ud800', expected text"),
    ({"prompt": [1, -(1 << 40)]}, "prompt[1]: got -1099511627776, expected an id in 0..2147"),
    ({"prompt": b"text"}, "prompt: got b'text', expected a text, or a list or array of token ids"),
    ({"generated_token_ids": "ab"}, "generated_token_ids: got 'ab', expected a list or array"),
    ({"prompt": None}, "prompt: got None, expected a text, or a list or array of token ids"),
    ({"timeout": float("nan")}, "timeout: got nan, expected a number of seconds"),
    ({"timeout": "5"}, "timeout: got '5', expected a number"),
    ({"timeout": np.float32(-1)}, "timeout: got -1.0, expected a number of seconds, at least 0"),
    ({"timeout": -1}, "timeout: got -1, expected a number of seconds, at least 0"),
    ({"resume_timeout": float("nan")}, "resume_timeout: got nan, expected"),
]


@pytest.mark.parametrize(("wrong", "text"), WRONG, ids=[text for _, text in WRONG])
def test_what_a_message_cannot_carry_is_named(
    served: tuple[Scripted, Client], wrong: dict[str, Any], text: str
) -> None:
    service, client = served
    with pytest.raises(InvalidRequestError) as caught:
        client.generate(**{"prompt": "x", **wrong})
    assert str(caught.value).startswith(text)
    assert ", expected " in str(caught.value)
    assert service.asked == []


def test_what_a_score_cannot_carry_is_named(served: tuple[Scripted, Client]) -> None:
    service, client = served
    with pytest.raises(InvalidRequestError, match=r"text\[0\]: got 4294967296"):
        client.score([1 << 32])
    with pytest.raises(InvalidRequestError, match=r"text\[2\]: got .* UTF-8"):
        client.score("ab\udcff")
    with pytest.raises(InvalidRequestError, match="timeout: got nan"):
        client.score("ab", timeout=math.nan)
    with pytest.raises(InvalidRequestError, match="timeout: got -1"):
        client.model_info(timeout=-1)
    assert service.asked == []


def test_the_widest_values_go_over_the_wire(served: tuple[Scripted, Client]) -> None:
    """Which of them make sense is the service's to say."""
    service, client = served
    widest = {"max_tokens": -(1 << 31), "top_k": np.int64((1 << 31) - 1), "seed": (1 << 63) - 1}
    numbers = {"temperature": float("nan"), "top_p": float("inf"), "min_p": 1}
    # Beyond what a deadline can be: none.
    list(client.generate(np.array([5, 6]), timeout=1e300, ignore_eos=True, **widest, **numbers))
    list(client.generate([], timeout=float("inf"), resume_timeout=float("inf")))
    asked = service.asked[0].sampling_params
    assert {name: getattr(asked, name) for name in widest} == widest
    assert math.isnan(asked.temperature)
    assert (asked.top_p, asked.min_p, asked.ignore_eos) == (float("inf"), 1.0, True)
    assert list(service.asked[0].tokens.ids) == [5, 6]
    assert service.asked[1].WhichOneof("prompt") == "tokens"


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
