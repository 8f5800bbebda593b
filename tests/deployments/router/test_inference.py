"""KServe's methods over completions that play back blocks."""

from __future__ import annotations

import asyncio
import json
import logging
import struct
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.deployments.router.test_router import Context
from twotower.deployments.access.access import Access
from twotower.deployments.access.keys import ApiKey, new_key
from twotower.deployments.completions.completions import ServedModel
from twotower.deployments.completions.requests import CompletionRequest
from twotower.deployments.router.inference import InferenceMethods, side_by_side
from twotower.protos.incoming import Refusal
from twotower.protos.kserve import inference_pb2 as pb
from twotower.protos.refusals import INTERNAL_TEXT, RequestRefusedError
from twotower.towers.decoding.commit_log import CommitLog
from twotower.towers.decoding.services import Block
from twotower.towers.errors import InvalidRequestError, QueueFullError
from twotower.towers.request.params import GenerationParams
from twotower.towers.request.token_ids import check_ids

Code = grpc.StatusCode
MODEL = ServedModel("m", "f1", "9.9", 512, 80, ("ar", "mask_diffusion"), 2, True, "M*", "float32")
# What each prompt of ids is answered with.
OUTPUT = ((10, 11), (12, 2))


class Playing:
    """A completion that commits OUTPUT, each block when `go` is set."""

    def __init__(self, service: Service, asked: CompletionRequest, charge: Any) -> None:
        self.params = asked.params
        self.seed = asked.params.seed
        self.log = CommitLog(3, ())
        self._service = service
        self._charge = charge

    async def blocks(self) -> AsyncIterator[tuple[Block, str]]:
        self._service.running += 1
        try:
            for ids in self._service.output:
                await self._service.go.wait()
                if isinstance(ids, Exception):
                    raise ids
                last = ids == self._service.output[-1]
                block = Block(self.log.end, ids, (0, 0), (1.0, 1.0), 3, 1, "stop" if last else None)
                self.log.append(block)
                self._charge(len(ids))
                yield block, "".join(f"<{token}>" for token in ids if token > 2)
        finally:
            self._service.running -= 1


class Service:
    """What the methods ask of Completions."""

    model = MODEL
    max_message = 4 << 20

    def __init__(self, output: Sequence[Any] = OUTPUT, ready: bool = True) -> None:
        self.output = output
        self.asked: list[CompletionRequest] = []
        self.running = 0
        self.go = asyncio.Event()
        self.go.set()
        self.ready = ready

    async def admit(self, asked: CompletionRequest, charge: Any) -> list[Playing]:
        if not isinstance(asked.prompt, str):
            check_ids("prompt", asked.prompt, MODEL.vocab_size)
        self.asked.append(asked)
        return [Playing(self, asked, charge)]

    async def is_ready(self) -> bool:
        return self.ready


class Methods(InferenceMethods):
    """The methods over a service that plays."""

    def __init__(self, service: Service | None = None, keys: Sequence[ApiKey] = ()) -> None:
        self.service = service or Service()
        self._completions: Any = self.service
        self._access = Access(keys)


def infer(text: str | None = "x", *, stream: bool | None = None, **values: Any) -> Any:
    """A request for a text; other values are fields of the message."""
    request = pb.ModelInferRequest(**{"model_name": "m"} | values)
    if text is not None:
        contents = pb.InferTensorContents(bytes_contents=[text.encode()])
        request.inputs.add(name="text_input", datatype="BYTES", shape=[1], contents=contents)
    if stream is not None:
        flags = pb.InferTensorContents(bool_contents=[stream])
        request.inputs.add(name="stream", datatype="BOOL", shape=[1], contents=flags)
    return request


def with_json(request: Any, body: str) -> Any:
    contents = pb.InferTensorContents(bytes_contents=[body.encode()])
    request.inputs.add(name="sampling_parameters", datatype="BYTES", shape=[1], contents=contents)
    return request


def parameters(**values: Any) -> dict[str, pb.InferParameter]:
    kinds = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
    return {
        name: pb.InferParameter(**{kinds[type(value)]: value}) for name, value in values.items()
    }


def outputs_of(response: pb.ModelInferResponse) -> dict[str, Any]:
    """Outputs by name, as a client reads them."""
    found: dict[str, Any] = {}
    for tensor, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        if tensor.datatype == "BYTES":
            assert struct.unpack("<I", raw[:4])[0] == len(raw) - 4
            found[tensor.name] = raw[4:].decode()
        else:
            assert len(raw) == 4 * tensor.shape[0]
            found[tensor.name] = list(struct.unpack(f"<{tensor.shape[0]}i", raw))
    return found


def numbers_of(response: pb.ModelInferResponse) -> dict[str, Any]:
    return {
        name: getattr(value, value.WhichOneof("parameter_choice") or "")
        for name, value in response.parameters.items()
    }


async def stream_of(*requests: Any) -> AsyncIterator[Any]:
    for request in requests:
        yield request


async def refused(call: Any, context: Context) -> tuple[Code | None, str]:
    with pytest.raises(RequestRefusedError):
        await (anext(call) if hasattr(call, "__anext__") else call)
    return context.code, context.details


async def test_live_and_ready() -> None:
    up, down = Methods(), Methods(Service(ready=False))
    assert (await down.ServerLive(pb.ServerLiveRequest())).live
    for methods, ready in ((up, True), (down, False)):
        assert (await methods.ServerReady(pb.ServerReadyRequest())).ready is ready
        asked = pb.ModelReadyRequest(name="m", version="1")
        assert (await methods.ModelReady(asked, Context())).ready is ready
    context = Context()
    call = up.ModelReady(pb.ModelReadyRequest(name="other"), context)
    assert await refused(call, context) == (
        Code.NOT_FOUND,
        "model_name: got 'other', expected 'm'",
    )


async def test_metadata() -> None:
    server = await Methods().ServerMetadata(pb.ServerMetadataRequest(), Context())
    assert (server.name, server.version) == ("twotower", "9.9")
    model = await Methods().ModelMetadata(pb.ModelMetadataRequest(name="m"), Context())
    assert (model.name, list(model.versions)) == ("m", ["1"])
    assert {one.name: (one.datatype, list(one.shape)) for one in model.inputs} == {
        "text_input": ("BYTES", [1]),
        "input_ids": ("INT32", [-1]),
        "sampling_parameters": ("BYTES", [1]),
        "stream": ("BOOL", [1]),
    }
    assert [one.name for one in model.outputs] == ["text_output", "output_ids", "finish_reason"]
    context = Context()
    call = Methods().ModelMetadata(pb.ModelMetadataRequest(name="m", version="2"), context)
    assert (await refused(call, context))[0] == Code.NOT_FOUND


async def test_one_answer() -> None:
    methods = Methods()
    request = infer(id="mine", parameters=parameters(seed=7, max_tokens=9))
    response = await methods.ModelInfer(request, Context())
    assert outputs_of(response) == {
        "text_output": "<10><11><12>",
        "output_ids": [10, 11, 12, 2],
        "finish_reason": "stop",
    }
    assert (response.model_name, response.model_version, response.id) == ("m", "1", "mine")
    assert numbers_of(response) == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "nfe": 6,
        "context_passes": 2,
        "cached_tokens": 0,
        "accepted_tokens": 0,
        "drafted_tokens": 0,
        "lookup_accepted_tokens": 0,
        "lookup_drafted_tokens": 0,
        "seed": 7,
        "triton_final_response": True,
    }
    assert methods.service.running == 0


async def test_parameters_reach_the_request() -> None:
    methods = Methods()
    body = {
        "mode": "ar",
        "max_tokens": 5,
        "stop": ["a", "b"],
        "logit_bias": {"7": -1.5},
        "top_k": None,
        "seed": 1,
    }
    request = with_json(
        infer(parameters=parameters(max_tokens=6, temperature=0.5, ignore_eos=True)),
        json.dumps(body),
    )
    await methods.ModelInfer(request, Context())
    [asked] = methods.service.asked
    assert asked.prompt == "x"
    assert asked.params == GenerationParams(
        mode="ar", max_tokens=6, temperature=0.5, stop=("a", "b"), logit_bias={7: -1.5}, seed=1
    )


@pytest.mark.parametrize("datatype", ["INT32", "INT64"])
async def test_ids_and_chosen_outputs(datatype: str) -> None:
    methods = Methods()
    request = infer(None)
    field = {"INT32": "int_contents", "INT64": "int64_contents"}[datatype]
    contents = pb.InferTensorContents(**{field: [5, 6]})
    request.inputs.add(name="input_ids", datatype=datatype, shape=[1, 2], contents=contents)
    request.outputs.add(name="output_ids")
    assert outputs_of(await methods.ModelInfer(request, Context())) == {
        "output_ids": [10, 11, 12, 2]
    }
    assert methods.service.asked[0].prompt == [5, 6]
    assert methods.service.asked[0].params.eos_token_id == 2


async def test_the_calls_name_is_that_of_a_request_without_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Context, "invocation_metadata", lambda _: (("x-request-id", "call-1"),))
    assert (await Methods().ModelInfer(infer(), Context())).id == "call-1"
    assert (await Methods().ModelInfer(infer(id="own"), Context())).id == "own"
    answers = [each async for each in Methods().ModelStreamInfer(stream_of(infer()), Context())]
    assert answers[0].infer_response.id not in ("", "call-1")


WRONG: list[tuple[Any, Code, str]] = [
    (infer(model_name="z"), Code.NOT_FOUND, "model_name: got 'z', expected 'm'"),
    (infer(model_version="2"), Code.NOT_FOUND, "model_version: got '2', expected '1'"),
    (infer(None), Code.INVALID_ARGUMENT, "text_input, input_ids: got 'neither', expected one of"),
    (infer(id="a b"), Code.INVALID_ARGUMENT, "id: got 'a b', expected at most 128 printable"),
    (infer(stream=True), Code.INVALID_ARGUMENT, "stream: got True, expected False: ModelStream"),
    (
        infer(parameters=parameters(max_tokens=0)),
        Code.INVALID_ARGUMENT,
        "max_tokens: got 0, expected a whole number of at least 1",
    ),
    (
        infer(parameters=parameters(what=0)),
        Code.INVALID_ARGUMENT,
        "parameters: got 'what', expected one of mode, max_tokens",
    ),
    (infer(parameters=parameters(top_logprobs=1)), Code.INVALID_ARGUMENT, "parameters: got 'top_"),
    (
        infer(parameters={"seed": pb.InferParameter()}),
        Code.INVALID_ARGUMENT,
        "seed: got 'nothing', expected a value",
    ),
    (
        infer(parameters=parameters(ignore_eos=1)),
        Code.INVALID_ARGUMENT,
        "ignore_eos: got 1, expected true or false",
    ),
    (with_json(infer(), "[1]"), Code.INVALID_ARGUMENT, "sampling_parameters: got '[1]', expected"),
    (with_json(infer(), "{"), Code.INVALID_ARGUMENT, "sampling_parameters: got '{', expected a J"),
    (
        with_json(infer(), '{"temperature": NaN}'),
        Code.INVALID_ARGUMENT,
        "sampling_parameters: got '{\"temperature\": NaN}', expected a JSON object",
    ),
    (with_json(infer(), "[" * 100_000), Code.INVALID_ARGUMENT, "sampling_parameters: got '[[["),
    (with_json(infer(), '{"seed": "1"}'), Code.INVALID_ARGUMENT, "seed: got '1', expected a whole"),
    (with_json(infer(), '{"mode": ["ar"]}'), Code.INVALID_ARGUMENT, "mode: got ['ar'], expected"),
    (with_json(infer(), '{"logit_bias": {"a": 1}}'), Code.INVALID_ARGUMENT, "logit_bias: got 'a'"),
    (with_json(infer(), f'{{"seed": {"9" * 5000}}}'), Code.INVALID_ARGUMENT, "sampling_param"),
]


@pytest.mark.parametrize(("request_", "code", "text"), WRONG)
async def test_what_is_refused_is_named(request_: Any, code: Code, text: str) -> None:
    context = Context()
    got, details = await refused(Methods().ModelInfer(request_, context), context)
    assert (got, details[: len(text)]) == (code, text)


async def test_texts_are_utf8() -> None:
    request, context = infer(None), Context()
    contents = pb.InferTensorContents(bytes_contents=[b"ab\xff"])
    request.inputs.add(name="text_input", datatype="BYTES", shape=[1], contents=contents)
    assert await refused(Methods().ModelInfer(request, context), context) == (
        Code.INVALID_ARGUMENT,
        "text_input: got 'byte 0xff at 2', expected UTF-8",
    )


async def test_unknown_outputs_and_long_messages_are_refused() -> None:
    request, context = infer(), Context()
    request.outputs.add(name="logits")
    assert await refused(Methods().ModelInfer(request, context), context) == (
        Code.INVALID_ARGUMENT,
        "outputs: got 'logits', expected one of text_output, output_ids, finish_reason",
    )
    methods = Methods()
    methods.service.max_message = 100  # type: ignore[misc]
    _, details = await refused(methods.ModelInfer(infer("x" * 200), context), context)
    assert details.startswith("message: got 2")


async def test_keys_are_asked_for_where_something_is_told() -> None:
    key, digest = new_key()
    methods = Methods(keys=[ApiKey(name="a", sha256=digest)])
    assert (await methods.ServerLive(pb.ServerLiveRequest())).live
    assert (await methods.ServerReady(pb.ServerReadyRequest())).ready
    assert (await methods.ModelReady(pb.ModelReadyRequest(name="m"), Context())).ready
    for call in (
        lambda context: methods.ServerMetadata(pb.ServerMetadataRequest(), context),
        lambda context: methods.ModelMetadata(pb.ModelMetadataRequest(name="m"), context),
        lambda context: methods.ModelInfer(infer(), context),
        lambda context: methods.ModelStreamInfer(stream_of(infer()), context),
    ):
        context = Context()
        code, details = await refused(call(context), context)
        assert code == Code.UNAUTHENTICATED
        assert key not in details


async def test_a_stream_has_an_answer_for_each_block() -> None:
    call = Methods().ModelStreamInfer(stream_of(infer(id="a", stream=True)), Context())
    answers = [each.infer_response async for each in call]
    assert [outputs_of(each) for each in answers] == [
        {"text_output": "<10><11>", "output_ids": [10, 11], "finish_reason": ""},
        {"text_output": "<12>", "output_ids": [12, 2], "finish_reason": "stop"},
    ]
    assert [numbers_of(each)["triton_final_response"] for each in answers] == [False, True]
    assert [numbers_of(each)["completion_tokens"] for each in answers] == [2, 4]


async def test_errors_are_messages_and_end_nothing() -> None:
    told = parameters(triton_enable_empty_final_response=True)
    requests = (
        infer(id="bad", parameters=parameters(max_tokens=0)),
        Refusal("message: got 3 bytes that are no message of this method"),
        infer(id="good", parameters=told),
    )
    call = Methods().ModelStreamInfer(stream_of(*requests), Context())
    answers = {each.infer_response.id: each async for each in call}
    assert answers["bad"].error_message.startswith("max_tokens: got 0")
    assert answers[""].error_message.startswith("message: got 3 bytes")
    assert answers["good"].error_message == ""
    for each in answers.values():
        assert numbers_of(each.infer_response)["triton_final_response"]
    assert outputs_of(answers["good"].infer_response)["text_output"] == "<10><11><12>"


async def test_an_internal_error_is_in_the_log_alone(caplog: pytest.LogCaptureFixture) -> None:
    methods = Methods(Service([(10, 11), RuntimeError("/secret")]))
    with caplog.at_level(logging.ERROR, "ray.serve"):
        call = methods.ModelStreamInfer(stream_of(infer(id="r7", stream=True)), Context())
        first, last = [each async for each in call]
    assert first.infer_response.outputs
    assert last.error_message == f"{INTERNAL_TEXT} r7"
    assert "secret" in caplog.text
    busy = Methods(Service([QueueFullError("3 rows wait")]))
    context = Context()
    code, _ = await refused(busy.ModelInfer(infer(), context), context)
    assert code == Code.RESOURCE_EXHAUSTED


async def test_leaving_a_stream_frees_its_rows() -> None:
    methods = Methods()
    methods.service.go.clear()
    call = methods.ModelStreamInfer(stream_of(infer(), infer(), infer()), Context())
    first = asyncio.ensure_future(anext(call))
    while methods.service.running < 3:
        await asyncio.sleep(0)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await call.aclose()
    assert methods.service.running == 0


async def test_limits_of_a_key_hold_for_each_request_of_a_stream() -> None:
    key, digest = new_key()
    methods = Methods(keys=[ApiKey(name="a", sha256=digest, max_concurrent=1)])
    context = Context()
    context.invocation_metadata = lambda: (("authorization", f"Bearer {key}"),)  # type: ignore
    call = methods.ModelStreamInfer(stream_of(infer(id="1"), infer(id="2")), context)
    methods.service.go.clear()
    refusal = await anext(call)
    assert "1 requests run, expected at most 1" in refusal.error_message
    methods.service.go.set()
    rest = [each async for each in call]
    assert [each.error_message for each in rest] == [""]
    assert {refusal.infer_response.id, rest[0].infer_response.id} == {"1", "2"}


async def test_requests_beyond_the_limit_are_left_unread() -> None:
    read: list[int] = []
    go = asyncio.Event()

    async def requests() -> AsyncIterator[int]:
        for number in range(5):
            read.append(number)
            yield number

    async def answers_of(number: int) -> AsyncIterator[Any]:
        await go.wait()
        yield number

    answers = side_by_side(requests(), answers_of, limit=2)  # type: ignore[arg-type]
    first = asyncio.ensure_future(anext(answers))
    for _ in range(20):
        await asyncio.sleep(0)
    # The third is read and waits for its place.
    assert read == [0, 1, 2]
    go.set()
    assert sorted([await first, *[each async for each in answers]]) == [0, 1, 2, 3, 4]


async def test_an_error_of_the_requests_ends_their_stream() -> None:
    async def requests() -> AsyncIterator[Any]:
        yield infer()
        raise ConnectionError("the proxy is gone")

    context = Context()
    call = Methods().ModelStreamInfer(requests(), context)
    with pytest.raises(RequestRefusedError):
        async for _ in call:
            pass
    assert context.code is not None


# Anything that a message can hold, near to what is meant and far from it.
NAMES = st.sampled_from(["text_input", "input_ids", "sampling_parameters", "stream", "", "x"])
TYPES = st.sampled_from(["BYTES", "INT32", "INT64", "BOOL", "FP32", ""])
SHAPES = st.lists(st.sampled_from([1, 0, 2, -1, 2**62, -(2**63)]), max_size=3)
CONTENTS = st.builds(
    pb.InferTensorContents,
    bool_contents=st.lists(st.booleans(), max_size=2),
    int_contents=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=2),
    int64_contents=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=2),
    bytes_contents=st.lists(
        st.one_of(
            st.binary(max_size=8),
            st.recursive(
                st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=3),
                lambda inner: (
                    st.lists(inner, max_size=2)
                    | st.dictionaries(
                        st.sampled_from(["seed", "stop", "logit_bias", "mode", "1", "top_p"]), inner
                    )
                ),
                max_leaves=5,
            ).map(lambda value: json.dumps(value).encode()),
        ),
        max_size=2,
    ),
)
TENSORS = st.builds(
    pb.ModelInferRequest.InferInputTensor,
    name=NAMES,
    datatype=TYPES,
    shape=SHAPES,
    contents=CONTENTS,
)
VALUES = st.one_of(
    st.builds(pb.InferParameter, bool_param=st.booleans()),
    st.builds(pb.InferParameter, int64_param=st.integers(-(2**63), 2**63 - 1)),
    st.builds(pb.InferParameter, uint64_param=st.integers(0, 2**64 - 1)),
    st.builds(pb.InferParameter, double_param=st.floats()),
    st.builds(pb.InferParameter, string_param=st.text(max_size=5)),
    st.just(pb.InferParameter()),
)
PARAMETERS = st.dictionaries(
    st.sampled_from([*GenerationParams.__dataclass_fields__, "ignore_eos", "n", ""]),
    VALUES,
    max_size=2,
)
REQUESTS = st.builds(
    pb.ModelInferRequest,
    model_name=st.sampled_from(["m", "m", "m", "z"]),
    id=st.text(max_size=3),
    parameters=PARAMETERS,
    inputs=st.lists(TENSORS, max_size=3),
    raw_input_contents=st.lists(st.binary(max_size=12), max_size=3),
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(REQUESTS)
def test_a_hostile_request_gets_an_answer_or_a_clean_refusal(request_: Any) -> None:
    async def ask() -> None:
        context = Context()
        try:
            response = await Methods().ModelInfer(request_, context)
        except RequestRefusedError:
            assert context.code in (Code.INVALID_ARGUMENT, Code.NOT_FOUND)
            assert 0 < len(context.details) <= 1024
        else:
            assert outputs_of(response)["output_ids"] == [10, 11, 12, 2]
        call = Methods().ModelStreamInfer(stream_of(request_, infer(id="last")), Context())
        answers = [each async for each in call]
        assert answers[-1].infer_response.id == "last" or len(answers) > 1
        assert not any(INTERNAL_TEXT in each.error_message for each in answers)

    asyncio.run(ask())


def test_what_is_admitted_is_checked() -> None:
    with pytest.raises(InvalidRequestError):
        asyncio.run(Service().admit(CompletionRequest("r", [-1], GenerationParams()), None))
