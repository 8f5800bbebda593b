"""Streams in the proxy end with their call, and clients read only what was made for them."""

from __future__ import annotations

import asyncio
import pickle
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from ray.exceptions import ActorDiedError
from ray.serve._private.common import DeploymentID
from ray.serve._private.grpc_util import (
    get_grpc_response_status,
    gRPCGenericServer,
    set_grpc_code_and_details,
)
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    gRPCStatusError,
)

from twotower.deployments.router.ingress import (
    MAX_UNREAD,
    add_generation,
    add_health,
    add_inference,
    watched,
)
from twotower.protos.incoming import MESSAGE_VARIABLE, Refusal
from twotower.protos.kserve import inference_pb2 as kserve_pb
from twotower.protos.refusals import BUSY_TEXT, LOST_TEXT, RequestRefusedError, marked
from twotower.protos.v1 import generation_pb2 as pb

Code = grpc.StatusCode
METHODS = (
    "/twotower.v1.Generation/Generate",
    "/twotower.v1.Generation/Score",
    "/twotower.v1.Generation/GetModelInfo",
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
    "/inference.GRPCInferenceService/ModelInfer",
)
STREAMS = (METHODS[0], METHODS[4])
BOTH_WAYS = "/inference.GRPCInferenceService/ModelStreamInfer"
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
LIMIT = 1000


class Context:
    """A call's context that forgets its peer when the call ends, as gRPC's does."""

    def __init__(self) -> None:
        self.callbacks: list[Callable[[Any], None]] = []
        self.sent: list[tuple[tuple[str, str], ...]] = []
        self.over = False
        self.status = grpc.StatusCode.OK
        self.text = ""

    def peer(self) -> str:
        assert not self.over, "reading this after the call has ended crashes the process"
        return "ipv4:127.0.0.1:5"

    peer_identities = auth_context = peer

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    async def send_initial_metadata(self, metadata: tuple[tuple[str, str], ...]) -> None:
        assert not self.over
        self.sent.append(metadata)

    def code(self) -> int:
        return int(self.status.value[0])

    def set_code(self, code: grpc.StatusCode) -> None:
        self.status = code

    def set_details(self, details: str) -> None:
        self.text = details

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self.callbacks.append(callback)

    def end(self) -> None:
        self.over = True
        for callback in self.callbacks:
            callback(self)


class Source:
    """A handler that notes how it ended."""

    def __init__(self, count: int, *, fails: bool = False, pauses: bool = False) -> None:
        self.count = count
        self.pauses = pauses
        self.fails = fails
        self.ended = ""

    async def __call__(self, _request: Any, context: Any) -> AsyncIterator[bytes]:
        try:
            for index in range(self.count):
                yield bytes([index % 256])
                if self.pauses:
                    await asyncio.sleep(0)
            if self.fails:
                raise RuntimeError("source")
            if self.count < 3:
                await asyncio.Event().wait()
            self.ended = "whole"
        except asyncio.CancelledError:
            self.ended = f"cancelled {context.peer()} {context.code()}"
            raise


async def test_a_whole_stream_passes() -> None:
    source = Source(5)
    messages = [message async for message in watched(source)(None, Context())]
    assert messages == [bytes([index]) for index in range(5)]
    assert source.ended == "whole"


async def test_an_error_ends_a_stream_with_a_fixed_sentence() -> None:
    context = Context()
    stream = watched(Source(4, fails=True))(None, context)
    assert [await anext(stream) for _ in range(4)] == [bytes([index]) for index in range(4)]
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    assert (context.status, context.text) == (grpc.StatusCode.UNAVAILABLE, LOST_TEXT)


async def test_a_call_that_ends_between_two_messages_cancels_its_source() -> None:
    source, context = Source(2), Context()
    stream = watched(source)(None, context)
    assert await anext(stream) == b"\0"
    context.end()
    await asyncio.sleep(0.01)
    assert source.ended == "cancelled ipv4:127.0.0.1:5 0"
    await stream.aclose()


async def test_a_client_that_does_not_read_is_cancelled() -> None:
    source, context = Source(2 * MAX_UNREAD, pauses=True), Context()
    stream = watched(source)(None, context)
    assert await anext(stream) == b"\0"
    while not source.ended:
        await asyncio.sleep(0)
    assert source.ended.startswith("cancelled")
    assert context.status == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert context.text == "the client reads too slowly; resume with generated_token_ids"
    left = [message async for message in stream]
    assert MAX_UNREAD <= len(left) <= MAX_UNREAD + 1


class Proxy:
    """Serve's own gRPC server with handlers that end as the proxy's do: with `error`, or well."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.asked: list[Any] = []
        self.metadata: list[dict[str, str]] = []
        self.left = asyncio.Event()
        self.server = gRPCGenericServer(self._handler)
        for add in (add_generation, add_health, add_inference):
            add(self, self.server)
        self.port = self.server.add_insecure_port("127.0.0.1:0")

    # Generated code takes the servicer's methods; Serve puts its own handlers in their place.
    def __getattr__(self, name: str) -> None:
        return None

    def _handler(self, *, service_method: str, streaming_type: Any) -> Any:
        async def unary(request: Any, context: Any) -> bytes:
            self._end(service_method, request, context)
            return b""

        async def stream(request: Any, context: Any) -> AsyncGenerator[bytes, None]:
            self._end(service_method, request, context)
            for message in ():
                yield message

        async def both(requests: Any, context: Any) -> AsyncGenerator[bytes, None]:
            self._end(service_method, None, context)
            try:
                async for request in requests:
                    self.asked.append(request)
                    yield repr(request).encode()
                    if getattr(request, "id", "") == "forever":
                        await asyncio.Event().wait()
            finally:
                self.left.set()

        kinds = {"unary_stream": stream, "stream_stream": both}
        return kinds.get(streaming_type.value, unary)

    def _end(self, method: str, request: Any, context: Any) -> None:
        self.asked.append((method, request))
        assert context.peer()
        self.metadata.append(dict(context.invocation_metadata()))
        if self.error is not None:
            status = get_grpc_response_status(self.error, None, "req-1")
            set_grpc_code_and_details(context, status)

    async def call(self, method: str, raw: bytes, **options: Any) -> tuple[Code, str]:
        """The status of a call whose message is these bytes."""
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self.port}") as channel:
            try:
                if method in STREAMS:
                    async for _ in channel.unary_stream(method)(raw, timeout=10, **options):
                        pass
                else:
                    await channel.unary_unary(method)(raw, timeout=10, **options)
            except grpc.aio.AioRpcError as error:
                return error.code(), error.details() or ""
        return Code.OK, ""


@pytest.fixture
async def proxy(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Proxy]:
    monkeypatch.setenv(MESSAGE_VARIABLE, str(LIMIT))
    made = Proxy()
    await made.server.start()
    yield made
    await made.server.stop(None)


@pytest.mark.parametrize("method", METHODS)
async def test_what_is_no_message_is_an_invalid_argument(proxy: Proxy, method: str) -> None:
    # A length that goes beyond the end, and a text that is no UTF-8 where there is one.
    for raw in (b"\x0a\xff", b"\x0a\x02\xff\xfe", b"\xff" * 20):
        if method.endswith("GetModelInfo") and raw[0] == 0x0A and raw[1] == 2:
            continue
        code, details = await proxy.call(method, raw)
        assert code == Code.INVALID_ARGUMENT
        assert details == f"message: got {len(raw)} bytes that are no message of this method"
    assert proxy.asked == []
    assert await proxy.call(method, b"") == (Code.OK, "")
    assert [name for name, _ in proxy.asked] == [method]


@pytest.mark.parametrize("method", METHODS)
async def test_a_message_that_is_too_long_is_not_parsed(proxy: Proxy, method: str) -> None:
    # Bytes of a field that no message has.
    fits, too_long = (bytes([0xFA, 0x07, 0xE5, 0x07]) + b"a" * count for count in (997, 997))
    fits = fits[:2] + bytes([0xE4, 0x07]) + b"a" * 996
    assert len(fits) == LIMIT
    assert await proxy.call(method, fits) == (Code.OK, "")
    text = f"message: got {LIMIT + 1}, expected at most {LIMIT} bytes"
    assert await proxy.call(method, too_long) == (Code.INVALID_ARGUMENT, text)
    assert len(proxy.asked) == 1


class DiedError(ActorDiedError):
    """As Ray reports it."""

    def __str__(self) -> str:
        return (
            "The actor died unexpectedly before finishing this task.\n\tclass_name: ServeReplica"
            "\n\tactor_id: 1e5f\n\tpid: 4711\n\tnamespace: serve\n\tip: 10.0.0.7"
        )


DIED = DiedError()
ENDS = [
    (DIED, Code.UNAVAILABLE, LOST_TEXT),
    (RuntimeError("/secret/path.py"), Code.UNAVAILABLE, LOST_TEXT),
    (TimeoutError("secret"), Code.DEADLINE_EXCEEDED, "the call took longer than"),
    (asyncio.CancelledError(), Code.CANCELLED, "the call was cancelled"),
    (BackPressureError(7, 7), Code.RESOURCE_EXHAUSTED, BUSY_TEXT),
    (
        DeploymentUnavailableError(DeploymentID("secret", "app")),
        Code.UNAVAILABLE,
        "the service is not up; try again later",
    ),
    (gRPCStatusError(DIED, Code.INTERNAL, None), Code.UNAVAILABLE, LOST_TEXT),
    (gRPCStatusError(DIED, Code.ABORTED, marked("lost twice")), Code.ABORTED, "lost twice"),
    (gRPCStatusError(DIED, Code.INTERNAL, marked("see log r-1")), Code.INTERNAL, "see log r-1"),
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("error", "code", "text"), ENDS)
@pytest.mark.parametrize("method", METHODS[:2])
async def test_clients_read_what_was_made_for_them(
    proxy: Proxy, method: str, error: BaseException, code: Code, text: str
) -> None:
    proxy.error = error
    got, details = await proxy.call(method, b"")
    assert got == code
    assert details.startswith(text)
    for sign in ("secret", "Replica", "1e5f", "4711", "namespace", "10.0.0.7", "req-1", "7"):
        assert sign not in details


async def test_a_message_reaches_the_handler_as_it_was_sent(proxy: Proxy) -> None:
    request = pb.GenerateRequest(text="def f():", generated_token_ids=[1, 2])
    assert (await proxy.call(METHODS[0], request.SerializeToString()))[0] == Code.OK
    assert proxy.asked == [(METHODS[0], request)]


async def headers(proxy: Proxy, method: str, raw: bytes, *metadata: tuple[str, str]) -> Any:
    """Initial metadata of a call, whatever its status."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{proxy.port}") as channel:
        begin = channel.unary_stream if method in STREAMS else channel.unary_unary
        call = begin(method)(raw, timeout=10, metadata=metadata)
        names = dict(await call.initial_metadata())
        await call.code()
        return names


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("error", [None, gRPCStatusError(DIED, Code.INTERNAL, marked("why"))])
async def test_a_call_has_its_clients_name_and_trace(proxy: Proxy, method: str, error: Any) -> None:
    proxy.error = error
    given = {"x-request-id": "mine-7", "traceparent": TRACE}
    shown = await headers(proxy, method, b"", *given.items(), ("other", "x"))
    assert {name: shown[name] for name in given} == given
    [seen] = proxy.metadata
    assert {name: seen[name] for name in given} == given
    assert seen["other"] == "x"


@pytest.mark.parametrize("method", METHODS)
async def test_a_call_without_a_name_gets_one(proxy: Proxy, method: str) -> None:
    first, second = [await headers(proxy, method, b"") for _ in range(2)]
    assert first["x-request-id"] != second["x-request-id"]
    seen = [metadata["x-request-id"] for metadata in proxy.metadata]
    assert seen == [first["x-request-id"], second["x-request-id"]]
    broken = await headers(proxy, method, b"", ("traceparent", TRACE.upper()))
    assert "traceparent" not in broken
    assert not any("traceparent" in metadata for metadata in proxy.metadata)


@pytest.mark.parametrize("method", METHODS)
async def test_an_invalid_name_is_refused(proxy: Proxy, method: str) -> None:
    for name in ("a b", "x" * 129):
        metadata = [("x-request-id", name), ("traceparent", TRACE)]
        code, details = await proxy.call(method, b"", metadata=metadata)
        assert code == Code.INVALID_ARGUMENT
        assert details.startswith("x-request-id: got '")
        shown = await headers(proxy, method, b"", *metadata)
        assert shown["x-request-id"] not in ("", name)
        assert shown["traceparent"] == TRACE
    assert proxy.asked == []


async def test_a_messages_own_name_goes_before_that_of_metadata(proxy: Proxy) -> None:
    raw = pb.GenerateRequest(request_id="own").SerializeToString()
    shown = await headers(proxy, METHODS[0], raw, ("x-request-id", "other"))
    assert shown["x-request-id"] == "own"
    raw = kserve_pb.ModelInferRequest(id="own-2").SerializeToString()
    assert (await headers(proxy, METHODS[5], raw))["x-request-id"] == "own-2"
    # The router refuses it: until then the call has another.
    raw = pb.GenerateRequest(request_id="a b").SerializeToString()
    assert (await headers(proxy, METHODS[0], raw, ("x-request-id", "c")))["x-request-id"] == "c"
    # A refusal of the proxy's has them too.
    assert (await headers(proxy, METHODS[0], b"\xff"))["x-request-id"]


async def test_a_stream_both_ways_passes_what_is_no_message_on(proxy: Proxy) -> None:
    request = kserve_pb.ModelInferRequest(model_name="m")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{proxy.port}") as channel:
        call = channel.stream_stream(BOTH_WAYS)(
            iter([request.SerializeToString(), b"\xff", b"\x0a" * (LIMIT + 1)]), timeout=10
        )
        assert dict(await call.initial_metadata())["x-request-id"]
        assert len([each async for each in call]) == 3
        assert await call.code() == Code.OK
    first, second, third = proxy.asked[1:]
    assert first == request
    assert second == Refusal("message: got 1 bytes that are no message of this method")
    assert third == Refusal(f"message: got {LIMIT + 1}, expected at most {LIMIT} bytes")


async def test_a_client_that_leaves_a_stream_both_ways_ends_it(proxy: Proxy) -> None:
    raw = kserve_pb.ModelInferRequest(id="forever").SerializeToString()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{proxy.port}") as channel:
        call = channel.stream_stream(BOTH_WAYS)(timeout=10)
        await call.write(raw)
        assert b"forever" in await call.read()
        call.cancel()
        await asyncio.wait_for(proxy.left.wait(), 5)


@pytest.mark.parametrize("method", METHODS[:2])
async def test_metadata_is_bounded_before_a_handler_sees_it(proxy: Proxy, method: str) -> None:
    code, _ = await proxy.call(method, b"", metadata=[("request_id", "x" * (64 << 10))])
    assert code == Code.RESOURCE_EXHAUSTED
    assert proxy.asked == []


async def test_a_server_makes_its_own_handlers_again_afterwards() -> None:
    proxy = Proxy()
    assert proxy.server.service_handler_factory == proxy._handler


def test_a_proxy_imports_no_model_code() -> None:
    """Nor when it reads the error that ends a refused call: that would hold up all its streams."""
    program = (
        "import pickle, sys\n"
        "import twotower.deployments.router.ingress\n"
        f"pickle.loads({pickle.dumps(RequestRefusedError('seed: got -1'))!r})\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], timeout=120, check=True)
