"""The router in Serve's local testing mode, over a pair that plays back blocks."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from ray import serve

from twotower.deployments.completions import encoding
from twotower.deployments.completions.encoding import Lane
from twotower.deployments.config import ServiceConfig
from twotower.deployments.pair.tower_pair import Job
from twotower.deployments.router import router as router_module
from twotower.deployments.router.router import SERVICE_NAME, Router
from twotower.protos.refusals import RequestRefusedError, shown
from twotower.protos.v1 import generation_pb2 as pb
from twotower.towers.config.model_config import TwoTowerConfig
from twotower.towers.decoding.services import Block, Scores
from twotower.towers.errors import NumericalError, QueueFullError, UnavailableError
from twotower.towers.text.fast_tokenizer import FastTokenizer
from twotower.towers.text.tokenizer import load_tokenizer

EOS = 2


_contexts: dict[int, Context] = {}


def _context(key: int) -> Context:
    return _contexts[key]


class Context:
    """What Serve hands to an ingress method, as far as it is used."""

    def __init__(self) -> None:
        self.code: grpc.StatusCode | None = None
        self.details = ""

    def __reduce__(self) -> tuple[object, tuple[int]]:
        # Arguments are pickled on their way to the ingress; what it sets must be seen here.
        _contexts[id(self)] = self
        return _context, (id(self),)

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    def peer(self) -> str:
        return "ipv4:127.0.0.1:50000"

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        assert self.code is not None
        self.code, self.details = shown(self.code, details)


class FakePair:
    """Plays back a script: one entry per block, an exception ends the stream with it."""

    def __init__(self, script: Sequence[Sequence[int] | Exception]) -> None:
        self._script = script

    async def generate(self, job: Job) -> AsyncIterator[Block]:
        start = len(job.prompt) + len(job.generated)
        for index, entry in enumerate(self._script):
            if isinstance(entry, Exception):
                raise entry
            last = index == len(self._script) - 1
            reason = ("stop" if EOS in entry else "length") if last else None
            count = len(entry)
            yield Block(
                start,
                tuple(entry),
                tuple(range(count)),
                (0.5,) * count,
                nfe=3,
                finish_reason=reason,  # type: ignore[arg-type]
                context_passes=1,
            )
            start += count

    async def score(self, token_ids: Sequence[int], top_logprobs: int = 0) -> Scores:
        tops = [tuple((token, -0.5) for token in range(top_logprobs)) for _ in token_ids[1:]]
        return Scores([-float(token) for token in token_ids[1:]], tops if top_logprobs else [])

    async def ping(self) -> bool:
        if self._script and isinstance(self._script[0], Exception):
            raise self._script[0]
        return True


class Handle:
    """Of pairs that nobody calls."""

    def options(self, **_: object) -> Handle:
        return self


async def first(answer: Any) -> Any:
    """The answer of a unary method, or the first message of a stream."""
    return await (anext(answer) if hasattr(answer, "__anext__") else answer)


class Calls:
    """Calls the ingress methods as Serve's proxy does."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self.context = Context()

    def generate(self, request: pb.GenerateRequest) -> list[pb.GenerateResponse]:
        stream = self._handle.options(stream=True).Generate.remote(
            request, grpc_context=self.context
        )
        return list(stream)

    def score(self, request: pb.ScoreRequest) -> pb.ScoreResponse:
        response: pb.ScoreResponse = self._handle.Score.remote(
            request, grpc_context=self.context
        ).result()
        return response

    def check(self, service: str) -> int:
        request = health_pb2.HealthCheckRequest(service=service)
        response = self._handle.Check.remote(request, grpc_context=self.context).result()
        return int(response.status)

    def list_health(self) -> dict[str, int]:
        response = self._handle.List.remote(health_pb2.HealthListRequest()).result()
        return {name: int(one.status) for name, one in response.statuses.items()}


Serving = Callable[..., Calls]


@pytest.fixture
def serving(tiny_text: Path) -> Serving:
    def start(*script: Sequence[int] | Exception, model: Path = tiny_text) -> Calls:
        # Room for what fields have limits of their own for.
        config = ServiceConfig(
            model=str(model),
            max_context=80,
            max_message_bytes=4 << 20,
            # What is lost stays lost here: what follows a loss has tests of its own.
            resume_timeout_s=1e-9,
        )
        pair = serve.deployment(FakePair).bind(script)
        app = serve.deployment(Router).bind(config, pair)
        return Calls(serve.run(app, _local_testing_mode=True))

    return start


def ask(*ids: int, **sampling: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        tokens=pb.TokenIds(ids=ids or (5, 6, 7)), sampling_params=pb.SamplingParams(**sampling)
    )


def test_a_stream_from_first_to_last_message(serving: Serving) -> None:
    calls = serving([10, 11], [12, EOS])
    request = ask(seed=9)
    request.request_id = "mine"
    started, first, second, complete = calls.generate(request)
    assert started.started == pb.Started(request_id="mine", seed=9, prompt_tokens=3)
    assert (first.block.index, first.block.start, list(first.block.token_ids)) == (0, 3, [10, 11])
    assert list(first.block.commit_steps) == [0, 1]
    assert list(first.block.confidences) == [0.5, 0.5]
    assert (second.block.index, second.block.start) == (1, 5)
    assert complete.complete.finish_reason == "stop"
    assert complete.complete.usage == pb.Usage(
        prompt_tokens=3, completion_tokens=4, nfe=6, context_passes=2
    )


def test_text_in_and_out_without_the_end_token(serving: Serving, tiny_text: Path) -> None:
    tokenizer = load_tokenizer(tiny_text)
    assert tokenizer is not None
    output = tokenizer.encode("return größe")
    calls = serving(output[:3], output[3:-1], [output[-1], EOS])
    request = pb.GenerateRequest(text="def f():")
    events = calls.generate(request)
    assert events[0].started.prompt_tokens == len(tokenizer.encode("def f():"))
    text = "".join(event.block.text for event in events[1:-1])
    assert text == "return größe"


def test_a_character_is_never_cut(serving: Serving, tiny_text: Path) -> None:
    tokenizer = load_tokenizer(tiny_text)
    assert tokenizer is not None
    output = tokenizer.encode("漢字")
    events = serving(*[[token] for token in output]).generate(ask())
    pieces = [event.block.text for event in events[1:-1]]
    assert "".join(pieces) == "漢字"
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_resumed_stream_sends_only_what_is_new(serving: Serving, tiny_text: Path) -> None:
    tokenizer = load_tokenizer(tiny_text)
    assert tokenizer is not None
    output = tokenizer.encode("x = 字")
    request = ask(seed=1, mode="ar")
    request.generated_token_ids.extend(output[:-1])
    events = serving([output[-1]]).generate(request)
    assert events[1].block.start == 3 + len(output) - 1
    assert events[1].block.text == "字"
    assert events[2].complete.usage.completion_tokens == len(output)


@pytest.mark.parametrize(
    ("generated", "reason"), [([9, 8, 7, 6], "length"), ([9, EOS], "stop"), ([9], None)]
)
def test_a_complete_output_gets_its_end_again(
    serving: Serving, generated: list[int], reason: str | None
) -> None:
    """Its client has lost no more than the last message, and may be in the middle of a block."""
    calls = serving(UnavailableError("not to be asked"))
    request = ask(seed=9, max_tokens=4, block_size=16)
    request.generated_token_ids.extend(generated)
    if reason is None:
        with pytest.raises(RequestRefusedError):
            calls.generate(request)
        assert "whole blocks of 16" in calls.context.details
        return
    started, complete = calls.generate(request)
    assert started.started.prompt_tokens == 3
    assert complete.complete == pb.Complete(
        finish_reason=reason,
        usage=pb.Usage(prompt_tokens=3, completion_tokens=len(generated)),
    )


def test_stop_strings_need_a_tokenizer(serving: Serving) -> None:
    tiny = Path(__file__).parents[2] / "golden" / "tiny_a"
    calls = serving([10], model=tiny)
    with pytest.raises(RequestRefusedError):
        calls.generate(ask(stop=["x"]))
    assert calls.context.code == grpc.StatusCode.INVALID_ARGUMENT
    assert calls.context.details.startswith("stop: got")


BAD = [
    (pb.GenerateRequest(), "prompt: got []"),
    (pb.GenerateRequest(text=""), "prompt: got []"),
    (ask(5, 512), "prompt[1]: got 512"),
    (ask(-1), "prompt[0]: got -1"),
    (ask(max_tokens=0), "max_tokens: got 0"),
    (ask(max_tokens=-4), "max_tokens: got -4"),
    (ask(block_size=0), "block_size: got 0"),
    (ask(block_size=257), "block_size: got 257"),
    (ask(steps_per_block=0), "steps_per_block: got 0"),
    (ask(confidence_threshold=1.5), "confidence_threshold: got 1.5"),
    (ask(confidence_threshold=-0.1), "confidence_threshold: got -0.1"),
    (ask(confidence_threshold=math.nan), "confidence_threshold: got nan"),
    (ask(temperature=math.nan), "temperature: got nan"),
    (ask(temperature=math.inf), "temperature: got inf"),
    (ask(temperature=-1.0), "temperature: got -1.0"),
    (ask(top_k=0), "top_k: got 0"),
    (ask(top_p=0.0), "top_p: got 0.0"),
    (ask(min_p=2.0), "min_p: got 2.0"),
    (ask(seed=-1), "seed: got -1"),
    (ask(mode="beam"), "mode: got 'beam'"),
    (ask(draft_steps=0), "draft_steps: got 0"),
    (ask(min_tokens=65), "min_tokens: got 65"),
    (ask(stop=["a"] * 17), "stop: got '17 strings'"),
    (ask(stop=["a", ""]), "stop[1]: got ''"),
    (
        pb.GenerateRequest(tokens=pb.TokenIds(ids=[5]), generated_token_ids=[1, -3]),
        "generated_token_ids[1]: got -3",
    ),
    (ask(*range(5, 60), max_tokens=17), "max_tokens: got '55 prompt + 17"),
    (ask(max_tokens=77), "max_tokens: got '3 prompt + 77"),
    (pb.GenerateRequest(request_id="a b", tokens=pb.TokenIds(ids=[5])), "request_id: got 'a b'"),
    (
        pb.GenerateRequest(tokens=pb.TokenIds(ids=[5]), generated_token_ids=[1, 2, 3]),
        "generated_token_ids: got '3 ids'",
    ),
]


MILLION = 1_000_000
BIG = [
    (pb.GenerateRequest(text="a" * 3_900_000), "prompt: got '3900000 bytes of text'"),
    (pb.GenerateRequest(text="漢" * MILLION), "prompt: got '3000000 bytes of text'"),
    (pb.GenerateRequest(text="a" * 600), "prompt: got '"),
    (pb.GenerateRequest(text="a" * (5 << 20)), "message: got 5242"),
    (ask(*[5] * MILLION), "prompt: got '1000000 tokens', expected at most 80 tokens"),
    (ask(*[-1] * 300_000), "prompt: got '300000 tokens', expected at most 80 tokens"),
    (
        pb.GenerateRequest(tokens=pb.TokenIds(ids=[5]), generated_token_ids=[9] * MILLION),
        "generated_token_ids: got '1000000 tokens', expected at most 80 tokens",
    ),
    (ask(stop=["a" * MILLION]), "stop[0]: got 'aaaa"),
    (ask(stop=[""] * MILLION), "stop: got '1000000 strings', expected at most 16 strings"),
    (ask(mode="ar" * MILLION), "mode: got 'arar"),
    (pb.GenerateRequest(request_id="r" * MILLION), "request_id: got 'rrrr"),
    (ask(max_tokens=2**31 - 1), "max_tokens: got '3 prompt + 2147483647 new tokens"),
    (ask(steps_per_block=-(2**31)), "steps_per_block: got -2147483648"),
    (ask(seed=-(2**63)), "seed: got -9223372036854775808"),
    (ask(confidence_threshold=-math.inf), "confidence_threshold: got -inf"),
    (ask(top_p=math.nan), "top_p: got nan"),
    (ask(min_p=math.nan), "min_p: got nan"),
    (ask(min_confidence_threshold=math.nan), "min_confidence_threshold: got nan"),
    (ask(min_steps_per_block=-1), "min_steps_per_block: got -1"),
]


@pytest.mark.parametrize(("request_", "text"), BIG, ids=[text for _, text in BIG])
def test_what_is_huge_is_refused_before_work_is_done(
    serving: Serving, request_: pb.GenerateRequest, text: str
) -> None:
    calls = serving([10])
    with pytest.raises(RequestRefusedError):
        calls.generate(request_)
    assert calls.context.code == grpc.StatusCode.INVALID_ARGUMENT
    assert calls.context.details.startswith(text)
    assert ", expected " in calls.context.details
    assert len(calls.context.details) < 300


def test_a_message_is_no_longer_than_a_request_can_be(tiny_text: Path) -> None:
    router = Router(ServiceConfig(model=str(tiny_text), max_context=64), Handle())
    context = Context()
    for request in (pb.GenerateRequest(text="a" * 100_000), pb.ScoreRequest(text="a" * 100_000)):
        ask_for = router.Generate if isinstance(request, pb.GenerateRequest) else router.Score
        with pytest.raises(RequestRefusedError):
            asyncio.run(first(ask_for(request, context)))  # type: ignore[arg-type]
        assert context.code == grpc.StatusCode.INVALID_ARGUMENT
        assert context.details.startswith("message: got 100004, expected at most ")


def test_a_text_that_cannot_fit_never_reaches_the_tokenizer(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer of these tests has tokens of up to a few dozen bytes, the model 80 places."""
    read: list[str] = []
    encode = FastTokenizer.encode
    monkeypatch.setattr(
        FastTokenizer, "encode", lambda self, text: read.append(text) or encode(self, text)
    )
    calls = serving([10])
    # Loading tries the empty text.
    assert read == [""]
    read.clear()
    for request in (pb.GenerateRequest(text="a" * 9000), pb.ScoreRequest(text="a" * 9000)):
        with pytest.raises(RequestRefusedError):
            (calls.generate if isinstance(request, pb.GenerateRequest) else calls.score)(request)
        assert "9000 bytes of text" in calls.context.details
    assert read == []
    calls.score(pb.ScoreRequest(text="def f():"))
    assert read == ["def f():"]


def test_too_many_texts_at_a_time_are_refused_as_a_full_queue_is(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(_self: Lane, _work: object) -> None:
        raise QueueFullError("2 long texts wait to be read, expected fewer")

    monkeypatch.setattr(Lane, "run", full)
    monkeypatch.setattr(encoding, "AT_ONCE_BYTES", 4)
    calls = serving([10])
    with pytest.raises(RequestRefusedError):
        calls.generate(pb.GenerateRequest(text="def f():"))
    assert calls.context.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert calls.context.details.endswith("; retry after 1 s")


@pytest.mark.parametrize("stop", [(), ("zzz",)])
def test_a_long_resumed_output_is_written_beside_the_loop(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, stop: tuple[str, ...]
) -> None:
    lanes: list[str] = []
    run = Lane.run

    async def noted(self: Lane, work: Callable[[], Any]) -> Any:
        lanes.append(self._name)
        return await run(self, work)

    monkeypatch.setattr(Lane, "run", noted)
    monkeypatch.setattr(encoding, "AT_ONCE_BYTES", 32)
    request = ask(seed=1, mode="ar", stop=stop)
    request.generated_token_ids.extend([10] * 9)
    assert serving([12]).generate(request)[1].block.start == 12
    assert lanes == ["short"]


@pytest.mark.parametrize(("request_", "text"), BAD, ids=[text for _, text in BAD])
def test_bad_input_is_named(serving: Serving, request_: pb.GenerateRequest, text: str) -> None:
    calls = serving([10])
    with pytest.raises(RequestRefusedError):
        calls.generate(request_)
    assert calls.context.code == grpc.StatusCode.INVALID_ARGUMENT
    assert calls.context.details.startswith(text)
    assert ", expected " in calls.context.details


def test_text_needs_a_tokenizer(serving: Serving) -> None:
    tiny = Path(__file__).parents[2] / "golden" / "tiny_a"
    calls = serving([10], model=tiny)
    with pytest.raises(RequestRefusedError):
        calls.generate(pb.GenerateRequest(text="def"))
    assert "no tokenizer" in calls.context.details


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (NumericalError("non-finite logits"), grpc.StatusCode.INTERNAL, "non-finite logits"),
        (UnavailableError("gone"), grpc.StatusCode.UNAVAILABLE, "gone"),
        (RuntimeError("/secret/path"), grpc.StatusCode.INTERNAL, "internal error"),
    ],
)
def test_errors_of_a_pair(
    serving: Serving, error: Exception, code: grpc.StatusCode, text: str
) -> None:
    calls = serving([10, 11], error)
    with pytest.raises(RequestRefusedError):
        calls.generate(ask())
    assert calls.context.code == code
    assert text in calls.context.details
    assert "secret" not in calls.context.details


def test_a_stream_without_an_end_is_an_error(serving: Serving) -> None:
    calls = serving()
    with pytest.raises(RequestRefusedError):
        calls.generate(ask())
    assert calls.context.code == grpc.StatusCode.INTERNAL


def test_score(serving: Serving) -> None:
    calls = serving([10])
    response = calls.score(pb.ScoreRequest(tokens=pb.TokenIds(ids=[4, 5, 6])))
    assert list(response.token_ids) == [4, 5, 6]
    assert list(response.log_probs) == [-5.0, -6.0]


@pytest.mark.parametrize("ids", [[], [512], [-1], [5] * 81, [-1] * 300_000])
def test_bad_input_of_score(serving: Serving, ids: list[int]) -> None:
    calls = serving([10])
    with pytest.raises(RequestRefusedError):
        calls.score(pb.ScoreRequest(tokens=pb.TokenIds(ids=ids)))
    assert calls.context.code == grpc.StatusCode.INVALID_ARGUMENT
    assert calls.context.details.startswith("input")


def test_health(serving: Serving) -> None:
    status = health_pb2.HealthCheckResponse
    calls = serving([10])
    assert calls.check("") == status.SERVING
    assert calls.check(SERVICE_NAME) == status.SERVING
    with pytest.raises(RequestRefusedError):
        calls.check("other")
    assert calls.context.code == grpc.StatusCode.NOT_FOUND
    down = serving(UnavailableError("no pair"))
    assert down.check("") == status.SERVING
    assert down.check(SERVICE_NAME) == status.NOT_SERVING
    assert down.list_health() == {"": status.SERVING, SERVICE_NAME: status.NOT_SERVING}


def test_model_info(tiny_text: Path) -> None:
    router = Router(ServiceConfig(model=str(tiny_text), max_context=64), Handle())
    info = asyncio.run(router.GetModelInfo(pb.GetModelInfoRequest(), Context()))
    config = TwoTowerConfig.from_file(tiny_text / "config.json")
    assert (info.vocab_size, info.max_context) == (config.vocab_size, 64)
    assert (info.eos_token_id, info.has_tokenizer) == (2, True)
    assert list(info.modes) == ["mask_diffusion", "ar", "mock_ar", "verified", "auto"]


def test_the_context_is_that_of_the_model_at_most(tiny_text: Path) -> None:
    config = TwoTowerConfig.from_file(tiny_text / "config.json")
    longer = config.max_position_embeddings + 1
    router = Router(ServiceConfig(model=str(tiny_text), max_context=longer), Handle())
    info = asyncio.run(router.GetModelInfo(pb.GetModelInfoRequest(), Context()))
    assert info.max_context == config.max_position_embeddings


@pytest.mark.parametrize(
    ("asked", "refusal"),
    [
        ({"mode": "mock_ar"}, "mode: got 'mock_ar', expected ar, verified, auto alone"),
        (
            {"mode": "verified", "draft_source": "denoiser"},
            "draft_source: got 'denoiser', expected any or lookup: this deployment has no denoiser "
            "tower",
        ),
    ],
)
def test_what_needs_a_denoiser_is_refused_without_one(
    tiny_text: Path, asked: dict[str, str], refusal: str
) -> None:
    router = Router(ServiceConfig(model=str(tiny_text), placement="ar_only"), Handle())
    info = asyncio.run(router.GetModelInfo(pb.GetModelInfoRequest(), Context()))
    assert list(info.modes) == ["ar", "verified", "auto"]
    context = Context()
    with pytest.raises(RequestRefusedError):
        asyncio.run(first(router.Generate(ask(**asked), context)))
    assert context.details == refusal


async def test_streams_of_health_are_bounded(
    tiny_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They need no key and never end."""
    monkeypatch.setattr(router_module, "MAX_WATCHES", 2)
    router = Router(ServiceConfig(model=str(tiny_text), max_context=64), Handle())
    request = health_pb2.HealthCheckRequest()
    streams = [router.Watch(request, Context()) for _ in range(2)]
    for stream in streams:
        assert (await anext(stream)).status == health_pb2.HealthCheckResponse.SERVING
    context = Context()
    with pytest.raises(RequestRefusedError):
        await anext(router.Watch(request, context))
    assert context.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    await streams[0].aclose()  # type: ignore[attr-defined]
    assert await anext(router.Watch(request, Context()))
