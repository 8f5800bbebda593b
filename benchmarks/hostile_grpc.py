"""Kinds of hostile requests to the gRPC front: by a client of its own, and as HTTP/2 by hand."""

from __future__ import annotations

import asyncio
import random
import struct
from typing import Any

import grpc

from benchmarks.hostile_values import damaged, spoil
from benchmarks.hostile_wire import (
    ANSWER_S,
    HELD_S,
    NO_ANSWER,
    SILENCE,
    Target,
    connected,
    ends,
    kind,
    sent,
)
from twotower.protos.v1 import generation_pb2 as pb

GENERATION = "/twotower.v1.Generation/"
GENERATE = f"{GENERATION}Generate"
_REQUESTS: dict[str, Any] = {
    "Generate": pb.GenerateRequest,
    "Score": pb.ScoreRequest,
    "Tokenize": pb.TokenizeRequest,
    "Detokenize": pb.DetokenizeRequest,
    "GetModelInfo": pb.GetModelInfoRequest,
}
_CHANNELS: dict[int, list[grpc.aio.Channel]] = {}
_NUM_CHANNELS = 4
# A message of its own length is the service's to refuse, not this client's.
_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
]


def _channel(target: Target, draw: random.Random) -> grpc.aio.Channel:
    if target.grpc_port not in _CHANNELS:
        _CHANNELS[target.grpc_port] = [_new_channel(target) for _ in range(_NUM_CHANNELS)]
    return draw.choice(_CHANNELS[target.grpc_port])


def _new_channel(target: Target) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(f"127.0.0.1:{target.grpc_port}", _OPTIONS)


async def close_channels() -> None:
    """Closes the connections of all channels."""
    while _CHANNELS:
        for channel in _CHANNELS.popitem()[1]:
            await channel.close()


async def _called(
    channel: grpc.aio.Channel, method: str, raw: bytes, timeout: float = ANSWER_S, **options: Any
) -> str:
    """The status of a call whose message is these bytes, streamed or not."""
    make = channel.unary_stream if method == GENERATE else channel.unary_unary
    try:
        call = make(method)(raw, timeout=timeout, **options)
        if method == GENERATE:
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        code = error.code().name
        late = code == "DEADLINE_EXCEEDED" and timeout == ANSWER_S
        if code == "INVALID_ARGUMENT" and ": " not in (error.details() or ""):
            return f"{code} without a field"
        return NO_ANSWER if late else code
    return "OK"


def _cheap() -> pb.GenerateRequest:
    sampling = pb.SamplingParams(max_tokens=2, block_size=2, steps_per_block=2)
    return pb.GenerateRequest(text="def f", sampling_params=sampling)


def _long(**sampling: Any) -> pb.GenerateRequest:
    # Long enough to be left in the middle, and each pass of it short.
    asked = {"max_tokens": 64, "block_size": 4, "ignore_eos": True, **sampling}
    return pb.GenerateRequest(text="def f", sampling_params=pb.SamplingParams(**asked))


@kind("grpc: wrong values", 12)
async def wrong_values(target: Target, draw: random.Random) -> str:
    name = draw.choice(("Generate", "Generate", "Score", "Tokenize", "Detokenize"))
    message = _cheap() if name == "Generate" else _REQUESTS[name]()
    spoil(draw, message, 0.12 if name == "Generate" else 0.5)
    raw = message.SerializeToString()
    return await _called(_channel(target, draw), GENERATION + name, raw)


@kind("grpc: no message", 8)
async def no_message(target: Target, draw: random.Random) -> str:
    name = draw.choice(tuple(_REQUESTS))
    whole = _cheap()
    spoil(draw, whole)
    raw = draw.choice(
        (
            draw.randbytes(draw.randint(0, 300)),
            damaged(draw, whole.SerializeToString()),
            b"\x0b" * draw.choice((50, 5_000, 50_000)),
            b"\x12\x02\xff\xfe",
            b"\xfa\x07\x03abc" * 20,
        )
    )
    return await _called(_channel(target, draw), GENERATION + name, raw)


@kind("grpc: huge message", 1.5)
async def huge(target: Target, draw: random.Random) -> str:
    size = draw.choice((1, 2, 8)) * target.max_message // 2
    options = {}
    if draw.random() < 0.3:
        # So much in little: eight megabytes of the same byte.
        size, options = 8 << 20, {"compression": grpc.Compression.Gzip}
    message = draw.choice(
        (
            pb.GenerateRequest(text="a" * size),
            pb.GenerateRequest(tokens=pb.TokenIds(ids=[5] * (size // 4))),
            pb.GenerateRequest(text="a", generated_token_ids=[5] * (size // 4)),
            pb.ScoreRequest(text="a" * size),
        )
    )
    name = "Score" if isinstance(message, pb.ScoreRequest) else "Generate"
    raw = message.SerializeToString()
    # On a connection of its own: this one may be closed.
    async with _new_channel(target) as channel:
        return await _called(channel, GENERATION + name, raw, **options)


@kind("grpc: metadata flood", 3)
async def metadata(target: Target, draw: random.Random) -> str:
    kinds: tuple[list[tuple[str, Any]], ...] = (
        [(f"x-{index}", "y" * draw.randint(0, 40)) for index in range(draw.randint(20, 300))],
        [("x", "y" * draw.choice((1_000, 7_000, 100_000)))],
        [("x-bin", draw.randbytes(draw.randint(0, 3000)))],
        [("authorization", "Bearer " * 100), ("authorization", "Basic a")],
        [("x-forwarded-for", "1.2.3.4"), ("request_id", "a" * 5000), ("application", "x")],
        [("multiplexed_model_id", "x"), ("session_id", "x"), ("traceparent", "00-x")],
    )
    raw = _cheap().SerializeToString()
    return await _called(_channel(target, draw), GENERATE, raw, metadata=draw.choice(kinds))


@kind("grpc: other methods", 3)
async def methods(target: Target, draw: random.Random) -> str:
    names = ("/", "/a", "/a/b", "/twotower.v1.Generation/", f"{GENERATE}2", "/x" * 500)
    serve = ("/ray.serve.RayServeAPIService/ListApplications", "/grpc.health.v1.Health/Check")
    method = draw.choice(names + serve)
    # Serve's own service answers what is no message with UNKNOWN; none of ours does.
    raw = b"" if method == serve[0] else draw.choice((b"", b"\x0a\x01a", b"\xff"))
    return await _called(_channel(target, draw), method, raw)


@kind("grpc: several messages, or none", 1.5)
async def many_messages(target: Target, draw: random.Random) -> str:
    count = draw.choice((0, 2, 20))

    async def messages() -> Any:
        for _ in range(count):
            yield _cheap().SerializeToString()

    # gRPC's server waits for a message as long as its client does.
    wait_s, late = (ANSWER_S, NO_ANSWER) if count else (HELD_S, SILENCE)
    name = draw.choice(("Generate", "Score"))
    call = _channel(target, draw).stream_stream(GENERATION + name)(messages(), timeout=wait_s)
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        return late if error.code().name == "DEADLINE_EXCEEDED" else error.code().name
    return "OK"


@kind("grpc: deadline in every phase", 1.5)
async def deadlines(target: Target, draw: random.Random) -> str:
    raw = _long().SerializeToString()
    return await _called(_channel(target, draw), GENERATE, raw, draw.uniform(0, 0.15))


async def _cancelled(
    channel: grpc.aio.Channel,
    draw: random.Random,
    request: pb.GenerateRequest,
    pause_s: float,
    messages: int = 0,
) -> str:
    """Cancels a stream after so many messages, and up to `pause_s` later."""
    call = channel.unary_stream(GENERATE)(request.SerializeToString(), timeout=ANSWER_S)
    try:
        for _ in range(messages):
            await call.read()
        await asyncio.sleep(draw.uniform(0, pause_s))
        call.cancel()
        return (await call.code()).name
    except (asyncio.CancelledError, grpc.aio.AioRpcError):
        return (await call.code()).name


@kind("grpc: abort in the queue", 0.5)
async def abort_queued(target: Target, draw: random.Random) -> str:
    request = _long()
    request.n = 10
    return await _cancelled(_channel(target, draw), draw, request, 0.02)


@kind("grpc: abort in prefill", 0.7)
async def abort_prefill(target: Target, draw: random.Random) -> str:
    ids = [draw.randrange(5, 2000) for _ in range(draw.randint(100, 250))]
    request = _long()
    request.tokens.ids.extend(ids)
    return await _cancelled(_channel(target, draw), draw, request, 0.1)


@kind("grpc: abort between blocks", 0.7)
async def abort_between(target: Target, draw: random.Random) -> str:
    request = _long()
    return await _cancelled(_channel(target, draw), draw, request, 0.0, draw.randint(1, 3))


@kind("grpc: abort in a block", 0.7)
async def abort_in_block(target: Target, draw: random.Random) -> str:
    request = _long(provisional=True)
    return await _cancelled(_channel(target, draw), draw, request, 0.05, draw.randint(1, 4))


@kind("grpc: connection closed in the middle", 1)
async def abort_connection(target: Target, draw: random.Random) -> str:
    async with _new_channel(target) as channel:
        call = channel.unary_stream(GENERATE)(_long().SerializeToString(), timeout=ANSWER_S)
        for _ in range(draw.randint(0, 2)):
            await call.read()
    return SILENCE


@kind("grpc: slow reader", 1)
async def slow_reader(target: Target, draw: random.Random) -> str:
    request = _long(max_tokens=16, provisional=True, top_logprobs=20, logprobs=True)
    request.n = 2
    call = _channel(target, draw).unary_stream(GENERATE)(
        request.SerializeToString(), timeout=ANSWER_S
    )
    await asyncio.sleep(draw.uniform(0, HELD_S))
    call.cancel()
    return SILENCE


_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def _frame(kind_: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return (
        struct.pack(">I", len(payload))[1:]
        + bytes((kind_, flags))
        + struct.pack(">I", stream)
        + payload
    )


def _literal(name: bytes, value: bytes) -> bytes:
    return b"\0" + bytes((len(name),)) + name + bytes((len(value),)) + value


_SETTINGS = _frame(4, 0, 0)
_HEADERS = b"".join(
    _literal(name, value)
    for name, value in (
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", GENERATE.encode()),
        (b":authority", b"a"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
    )
)
_MESSAGE = _cheap().SerializeToString()
_DATA = b"\0" + struct.pack(">I", len(_MESSAGE)) + _MESSAGE


def _garbage(draw: random.Random) -> bytes:
    """Bytes after a connection's first ones that no good client sends."""
    opened = _SETTINGS + _frame(1, 4, 1, _HEADERS)
    return draw.choice(
        (
            draw.randbytes(draw.randint(1, 3000)),
            _frame(4, 0, 0, struct.pack(">HI", 4, 2**32 - 1)),
            _frame(4, 0, 0, struct.pack(">HI", 5, 1)),
            _frame(4, 0, 0, b"abc"),
            _SETTINGS + _frame(1, 4, 1, draw.randbytes(200)),
            _SETTINGS + _frame(1, 0, 1, _HEADERS) + _frame(9, 0, 1, b"\0" * 5000) * 20,
            _SETTINGS + _frame(6, 0, 0, b"pingpong") * 500,
            _SETTINGS + _frame(0, 0, 7, b"data on a stream that nobody opened"),
            _SETTINGS + _frame(8, 0, 0, struct.pack(">I", 2**31 - 1)) * 3,
            _SETTINGS + _frame(99, 255, 2**31 - 1, b"?" * 300),
            _SETTINGS + b"\xff\xff\xff\0\0\0\0\0\1" + b"a" * 5000,
            opened + _frame(0, 1, 1, b"\0\xff\xff\xff\xff" + b"a" * 100),
            opened + _frame(0, 1, 1, b"\7" + _DATA[1:]),
            opened + _frame(0, 1, 1, _DATA[:-3]),
            opened + _frame(0, 1, 1, b""),
            opened + _frame(0, 1, 1, b"\1" + _DATA[1:]),
            opened * 3,
            _SETTINGS + _resets(),
        )
    )


def _resets() -> bytes:
    """Streams that are opened and reset at once, many of them."""
    return b"".join(
        _frame(1, 4, stream, _HEADERS)
        + _frame(0, 1, stream, _DATA)
        + _frame(3, 0, stream, b"\0\0\0\x08")
        for stream in range(1, 101, 2)
    )


@kind("grpc: HTTP/2 garbage", 5)
async def garbage(target: Target, draw: random.Random) -> str:
    async with connected(target.grpc_port, abrupt=draw.random() < 0.5) as (reader, writer):
        await sent(writer, _PREFACE + _garbage(draw))
        return await ends(reader, draw.uniform(0, HELD_S))


@kind("grpc: no HTTP/2", 3)
async def no_http2(target: Target, draw: random.Random) -> str:
    data = draw.choice(
        (
            b"GET / HTTP/1.1\r\nhost: a\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"a" * 200,
            draw.randbytes(draw.randint(1, 5000)),
            _PREFACE[: draw.randint(1, 23)],
            _PREFACE.replace(b"2", b"3"),
        )
    )
    async with connected(target.grpc_port, abrupt=draw.random() < 0.5) as (reader, writer):
        await sent(writer, data)
        return await ends(reader, draw.uniform(0, HELD_S))


@kind("grpc: half-open connection, slow writer", 2)
async def half_open(target: Target, draw: random.Random) -> str:
    whole = _PREFACE + _SETTINGS + _frame(1, 4, 1, _HEADERS) + _frame(0, 0, 1, _DATA[:-3])
    data = whole[: draw.choice((0, 10, 24, 33, 60, len(whole)))]
    async with connected(target.grpc_port, abrupt=draw.random() < 0.5) as (reader, writer):
        step = draw.choice((7, 1000))
        for start in range(0, len(data), step):
            await sent(writer, data[start : start + step])
            await asyncio.sleep(draw.uniform(0, 0.03))
        return await ends(reader, draw.uniform(0, HELD_S))
