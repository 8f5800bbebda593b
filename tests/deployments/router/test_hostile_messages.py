"""Arbitrary messages into the real ingress and router: a client's fault is always called one."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ray.serve._private.grpc_util import gRPCGenericServer

from tests.support.pair_here import HandleHere
from twotower.deployments.config import ServiceConfig
from twotower.deployments.router.ingress import add_generation
from twotower.deployments.router.router import Router
from twotower.protos.refusals import RequestRefusedError
from twotower.protos.v1 import generation_pb2 as pb

MAX_CONTEXT = 64
GENERATE = "/twotower.v1.Generation/Generate"
REQUESTS: dict[str, type[Message]] = {
    GENERATE: pb.GenerateRequest,
    "/twotower.v1.Generation/Score": pb.ScoreRequest,
    "/twotower.v1.Generation/Tokenize": pb.TokenizeRequest,
    "/twotower.v1.Generation/Detokenize": pb.DetokenizeRequest,
}
# "stop[1]: got ...", "logit_bias[7]: got ...", "message: got ..."
A_FIELD = re.compile(r"[a-z_]+(\[[^\]]*\])*: got ")
SETTINGS = settings(max_examples=100, deadline=None, derandomize=True, database=None)


class Context:
    """What Serve hands to a router, which runs in another process than the call."""

    def __init__(self, metadata: Any) -> None:
        self.code: grpc.StatusCode | None = None
        self.details = ""
        self._metadata = metadata

    def invocation_metadata(self) -> Any:
        return self._metadata

    def peer(self) -> str:
        return "ipv4:127.0.0.1:5"

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details


class Service:
    """Serve's gRPC server with the ingress, and the router behind it over a pair, in one thread."""

    # Generated code takes the servicer's methods; Serve puts its own handlers in their place.
    Generate = Score = Tokenize = Detokenize = GetModelInfo = None

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> Service:
        self._thread.start()
        self.address = self._do(self._start)
        self._channel = grpc.insecure_channel(self.address)
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()
        self._do(lambda: self._server.stop(None))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def call(self, method: str, raw: bytes) -> tuple[grpc.StatusCode, str]:
        """The status of a call whose message is these bytes."""
        try:
            if method == GENERATE:
                list(self._channel.unary_stream(method)(raw, timeout=30))
            else:
                self._channel.unary_unary(method)(raw, timeout=30)
        except grpc.RpcError as error:
            return error.code(), error.details()
        return grpc.StatusCode.OK, ""

    def rows(self) -> int:
        """Rows that are left a moment after the last call, if any are."""

        async def settled() -> int:
            for _ in range(200):
                if not self._handle.rows():
                    break
                await asyncio.sleep(0.01)
            return self._handle.rows()

        return int(self._do(settled))

    def _do(self, work: Callable[[], Any]) -> Any:
        async def run() -> Any:
            return await work()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(60)

    async def _start(self) -> str:
        self._handle = HandleHere(self._folder, max_context=MAX_CONTEXT)
        config = ServiceConfig(model=str(self._folder), max_context=MAX_CONTEXT)
        self._router = Router(config, self._handle)
        self._server = gRPCGenericServer(self._handler)
        add_generation(self, self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return f"127.0.0.1:{port}"

    def _handler(self, *, service_method: str, streaming_type: Any) -> Any:
        method = getattr(self._router, service_method.rpartition("/")[2])

        async def unary(request: Any, context: Any) -> bytes:
            own = Context(context.invocation_metadata())
            try:
                answer: bytes = (await method(request, own)).SerializeToString()
            except RequestRefusedError:
                return _refused(own, context)
            return answer

        async def stream(request: Any, context: Any) -> AsyncGenerator[bytes, None]:
            own = Context(context.invocation_metadata())
            try:
                async for message in method(request, own):
                    yield message.SerializeToString()
            except RequestRefusedError:
                _refused(own, context)

        return stream if streaming_type.value == "unary_stream" else unary


def _refused(own: Context, context: Any) -> bytes:
    context.set_code(own.code)
    context.set_details(own.details)
    return b""


@pytest.fixture(scope="module")
def service(tiny_text: Path) -> Iterator[Service]:
    with Service(tiny_text) as running:
        yield running


def judge(service: Service, method: str, raw: bytes) -> grpc.StatusCode:
    """The code of a call, which has to be a good one, after which nothing may be left."""
    code, details = service.call(method, raw)
    assert code in (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT), (code, details)
    assert code == grpc.StatusCode.OK or A_FIELD.match(details), details
    assert service.rows() == 0
    return code


INT32 = st.integers(-(2**31), 2**31 - 1)
SCALARS: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.CPPTYPE_INT32: st.integers(-2, 20) | INT32,
    FieldDescriptor.CPPTYPE_INT64: st.integers(-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_DOUBLE: st.floats(0, 1) | st.floats(),
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
    FieldDescriptor.CPPTYPE_STRING: st.sampled_from(["ar", "mock_ar", "verified"]) | st.text(),
}
# A row that fits is short: it has to be generated.
NAMED = {"n": st.integers(-1, 4) | INT32, "max_tokens": st.integers(-1, 12) | INT32}


def field_values(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    """Values that a field can be set to, in or out of its limits."""
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return st.dictionaries(SCALARS[FieldDescriptor.CPPTYPE_INT32], st.floats(), max_size=4)
    if field.message_type is not None:
        return messages(field.message_type._concrete_class)
    value = NAMED.get(field.name, SCALARS[field.cpp_type])
    return st.lists(value, max_size=20) if field.is_repeated else value


def messages(kind: type[Message]) -> st.SearchStrategy[Message]:
    """Messages of a kind with a few of their fields set, of each oneof at most one."""
    fields = {field.name: field_values(field) for field in kind.DESCRIPTOR.fields}
    some = st.lists(st.sampled_from(sorted(fields)), max_size=5, unique=True)
    chosen = some.flatmap(
        lambda names: st.fixed_dictionaries({each: fields[each] for each in names})
    )
    return chosen.map(lambda values: kind(**values))


@SETTINGS
@given(message=messages(pb.GenerateRequest))
@example(message=pb.GenerateRequest(text="a", sampling_params=pb.SamplingParams(max_tokens=3)))
def test_any_values_of_a_generate_request(service: Service, message: Any) -> None:
    judge(service, GENERATE, message.SerializeToString())


@SETTINGS
@given(sampling=messages(pb.SamplingParams))
def test_any_sampling_parameters_of_a_good_prompt(service: Service, sampling: Any) -> None:
    if not sampling.HasField("max_tokens"):
        sampling.max_tokens = 4
    message = pb.GenerateRequest(tokens=pb.TokenIds(ids=[5, 6, 7]), sampling_params=sampling)
    judge(service, GENERATE, message.SerializeToString())


@pytest.mark.parametrize("method", list(REQUESTS)[1:])
def test_any_values_of_other_requests(service: Service, method: str) -> None:
    @SETTINGS
    @given(message=messages(REQUESTS[method]))
    def judged(message: Any) -> None:
        codes.add(judge(service, method, message.SerializeToString()))

    codes: set[grpc.StatusCode] = set()
    judged()
    assert grpc.StatusCode.OK in codes


VALID = pb.GenerateRequest(
    text="a", sampling_params=pb.SamplingParams(max_tokens=2, stop=["x"], logit_bias={5: 1.0}), n=2
).SerializeToString()


@st.composite
def damaged(draw: Any) -> bytes:
    """A message of which some bytes are others, lost or new."""
    raw = bytearray(VALID)
    for _ in range(draw(st.integers(1, 3))):
        begin = draw(st.integers(0, len(raw)))
        raw[begin : begin + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(raw)


@pytest.mark.parametrize("method", REQUESTS)
def test_any_bytes(service: Service, method: str) -> None:
    @SETTINGS
    @given(raw=st.binary(max_size=100) | damaged())
    @example(raw=b"\x0b" * 20_000)
    def judged(raw: bytes) -> None:
        codes.add(judge(service, method, raw))

    codes: set[grpc.StatusCode] = set()
    judged()
    assert grpc.StatusCode.INVALID_ARGUMENT in codes
