"""Kinds of hostile requests to the HTTP front. What a client library refuses to send goes through
plain sockets."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import httpx

from benchmarks.hostile_values import (
    BASES,
    damaged,
    joined,
    json_body,
    json_value,
    nested,
)
from benchmarks.hostile_wire import (
    ANSWER_S,
    CLOSED,
    HELD_S,
    NO_ANSWER,
    SILENCE,
    Target,
    connected,
    ends,
    http_status,
    kind,
    sent,
)
from twotower.protos.incoming import longest_body

COMPLETIONS = "/v1/completions"
_JSON = {"content-type": "application/json"}
_ERROR_FIELDS = {"message", "type", "param", "code"}
_CLIENTS: dict[int, httpx.AsyncClient] = {}


def _client(target: Target) -> httpx.AsyncClient:
    """One client for all requests, which uses its connections again after a refusal."""
    if target.http_port not in _CLIENTS:
        _CLIENTS[target.http_port] = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{target.http_port}", timeout=ANSWER_S, trust_env=False
        )
    return _CLIENTS[target.http_port]


async def close_clients() -> None:
    """Closes the connections of all clients."""
    while _CLIENTS:
        await _CLIENTS.popitem()[1].aclose()


async def _post(target: Target, path: str, content: Any, headers: dict[str, str] = _JSON) -> str:
    try:
        answer = await _client(target).post(path, content=content, headers=headers)
    except httpx.TimeoutException:
        return NO_ANSWER
    except httpx.TransportError:
        # The server may answer and close before it has all of a body that is too long.
        return CLOSED
    return _judged(answer)


def _judged(answer: httpx.Response) -> str:
    status = str(answer.status_code)
    if answer.status_code < 400:
        return status
    try:
        body = answer.json()
    except ValueError:
        return f"{status} without JSON"
    whole = isinstance(body, dict) and set(body.get("error", ())) == _ERROR_FIELDS
    return status if whole else f"{status} in another shape"


@kind("http: wrong values and types", 14)
async def wrong_values(target: Target, draw: random.Random) -> str:
    path = draw.choice(tuple(BASES))
    return await _post(target, path, json_body(draw, path).encode("utf-8", "surrogatepass"))


@kind("http: unknown and double fields", 4)
async def unknown_fields(target: Target, draw: random.Random) -> str:
    path = draw.choice(tuple(BASES))
    fields = list(BASES[path].items())
    if draw.random() < 0.5:
        fields.append((draw.choice(("", "Prompt", "__class__", "x" * 3000)), json_value(draw)))
    else:
        fields += [(draw.choice(fields)[0], json_value(draw)) for _ in range(3)]
    return await _post(target, path, joined(fields).encode())


@kind("http: deep nesting", 3)
async def deep(target: Target, draw: random.Random) -> str:
    return await _post(target, draw.choice(tuple(BASES)), nested(draw).encode())


@kind("http: no UTF-8, no JSON", 6)
async def no_json(target: Target, draw: random.Random) -> str:
    path = draw.choice(tuple(BASES))
    text = joined(list(BASES[path].items()))
    body = draw.choice(
        (
            text.encode("utf-16"),
            b"\xef\xbb\xbf" + text.encode(),
            text.encode().replace(b"f", b"\xff\xfe"),
            text.encode().replace(b"f", b"\xed\xa0\x80"),
            draw.randbytes(draw.randint(0, 300)),
            damaged(draw, text.encode()),
            text.encode() * 2,
        )
    )
    return await _post(target, path, body)


@kind("http: huge body", 1.5)
async def huge(target: Target, draw: random.Random) -> str:
    longest = longest_body(target.max_message)
    size = draw.choice((longest // 8, longest // 2, longest - 200, longest + 1, 2 * longest))
    what = draw.randrange(4)
    if what == 0:
        prompt = '"' + "a" * size + '"'
    elif what == 1:
        prompt = "[" + "5," * (size // 2) + "5]"
    elif what == 2:
        prompt = '["a"' + ',"a"' * (size // 4) + "]"
    else:
        prompt = "[" + "[]," * (size // 3) + "[5]]"
    body = joined([("prompt", prompt), ("max_tokens", "1")]).encode()
    return await _post(target, COMPLETIONS, body)


@kind("http: huge body in chunks", 0.7)
async def huge_chunks(target: Target, draw: random.Random) -> str:
    longest = longest_body(target.max_message)
    piece = draw.choice((100, 1 << 16)) * b"a"

    async def chunks() -> Any:
        for _ in range(min(2 * longest // len(piece), 200)):
            yield piece

    return await _post(target, COMPLETIONS, chunks())


@kind("http: other content types", 2)
async def content_types(target: Target, draw: random.Random) -> str:
    kinds = ("", "text/plain", "multipart/form-data", "application/x-www-form-urlencoded")
    other = ("application/json; charset=utf-16", "application/grpc", "a/b/c", "\\", "json" * 500)
    headers = {"content-type": draw.choice(kinds + other)}
    if draw.random() < 0.3:
        headers["content-encoding"] = draw.choice(("gzip", "br", "identity", "?"))
    path = draw.choice(tuple(BASES))
    return await _post(target, path, joined(list(BASES[path].items())).encode(), headers)


@kind("http: other methods and paths", 6)
async def methods(target: Target, draw: random.Random) -> str:
    method = draw.choice(("GET", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "PATCH", "POST"))
    odd = ("//", "/..", "/%00", "/%2e%2e/%2e%2e/etc/passwd", "/v1", "/v1/models/%ff", "/admin/x")
    more = ("/-/healthz", "/-/routes", "/v1/models/" + "a/" * 200, "/metrics", "/page/../app.py")
    path = draw.choice((*BASES, *odd, *more, "/?" + "a=b&" * 200, "/health"))
    try:
        answer = await _client(target).request(method, path)
    except httpx.TimeoutException:
        return NO_ANSWER
    # HEAD has no body, and Serve's own probes have another.
    own = method == "HEAD" or path.startswith("/-/") or answer.status_code == 405
    return str(answer.status_code) if own else _judged(answer)


async def _raw(target: Target, data: bytes, late: str = NO_ANSWER) -> str:
    async with connected(target.http_port) as (reader, writer):
        await sent(writer, data)
        return await http_status(reader, ANSWER_S if late == NO_ANSWER else HELD_S, late)


def _head(path: str = COMPLETIONS, *lines: str, method: str = "POST") -> bytes:
    first = (f"{method} {path} HTTP/1.1", "host: 127.0.0.1", "content-type: application/json")
    return "\r\n".join((*first, *lines, "", "")).encode("latin-1")


def _whole(**body: Any) -> bytes:
    raw = json.dumps(body).encode()
    return _head(COMPLETIONS, f"content-length: {len(raw)}") + raw


@kind("http: header flood", 3)
async def header_flood(target: Target, draw: random.Random) -> str:
    odd = ("x: \x80\xff", "authorization: " + "Bearer " * 300, "x-request-id: " + "é" * 50)
    more = ("x-forwarded-for: " + "1.2.3.4, " * 500, "cookie: " + "a=b; " * 1000, "te: trailers")
    ours = ("x-request-timeout-seconds: 0.0001", "x-request-disconnect-disabled: ?1", "range: x")
    lines = draw.choice(
        (
            [f"x-{index}: {'y' * draw.randint(0, 200)}" for index in range(draw.randint(50, 400))],
            [f"x: {'y' * draw.choice((8_000, 60_000, 200_000))}"],
            [f"{'x' * draw.choice((300, 70_000))}: y"],
            [draw.choice((*odd, *more, *ours)) for _ in range(draw.randint(1, 10))],
            ["x-request-id: a"] * 100,
        )
    )
    body = b'{"prompt":"a","max_tokens":1}'
    return await _raw(target, _head(COMPLETIONS, *lines, f"content-length: {len(body)}") + body)


@kind("http: long path", 1.5)
async def long_path(target: Target, draw: random.Random) -> str:
    path = "/v1/models/" + draw.choice(("a", "%41", "%ff", "/")) * draw.choice(
        (1_000, 5_000, 70_000)
    )
    return await _raw(target, _head(path, method="GET"))


# "@" stands for the header that every request needs.
_BAD = (
    b"\r\n\r\n",
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET /health\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0" * 64,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"a" * 200,
    b"POST / HTTP/1.1\r\n@content-length: -1\r\n\r\n",
    b"POST / HTTP/1.1\r\n@content-length: 99999999999999999999999\r\n\r\n",
    b"POST / HTTP/1.1\r\n@content-length: 1\r\ncontent-length: 2\r\n\r\nab",
    b"POST / HTTP/1.1\r\n@content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0",
    b"POST / HTTP/1.1\r\n@transfer-encoding: chunked\r\n\r\nzz\r\n\r\n",
    b"POST / HTTP/1.1\r\n@transfer-encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
    b"POST / HTTP/1.1\r\n@transfer-encoding: gzip, x\r\n\r\n",
    b"GET / HTTP/1.1\nhost: 127.0.0.1\n\n",
    b"GET / HTTP/1.1\r\nhost : 127.0.0.1\r\n folded\r\n\r\n",
    b"GET / HTTP/1.1\r\n@\0\0\0: \r\n\r\n",
    b"GET http://[::1 HTTP/1.1\r\n@\r\n",
    b"GET / HTTP/1.1\r\n@upgrade: websocket\r\nconnection: upgrade\r\n"
    b"sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\nsec-websocket-version: 13\r\n\r\n",
    b"GET / HTTP/1.1\r\n@upgrade: h2c\r\nconnection: upgrade\r\n\r\n",
    b"CONNECT a:1 HTTP/1.1\r\n@\r\n",
    b"POST /tokenize HTTP/1.1\r\n@expect: 100-continue\r\ncontent-length: 2\r\n\r\n{}",
)


@kind("http: bad HTTP", 5)
async def bad_http(target: Target, draw: random.Random) -> str:
    data = draw.choice(_BAD).replace(b"@", b"host: 127.0.0.1\r\n")
    if draw.random() < 0.3:
        data = draw.choice((damaged(draw, data), draw.randbytes(draw.randint(1, 4000))))
    # Some of it is the beginning of something, whose rest a server may wait for.
    return await _raw(target, data, SILENCE)


@kind("http: body that stops", 2)
async def stopped(target: Target, draw: random.Random) -> str:
    body = b'{"prompt":"a","max_tokens":1}'
    if draw.random() < 0.5:
        data = _head(COMPLETIONS, f"content-length: {len(body) + 100}") + body
    else:
        data = _head(COMPLETIONS, "transfer-encoding: chunked") + b"1d\r\n" + body + b"\r\n5\r\nab"
    async with connected(target.http_port, abrupt=draw.random() < 0.5) as (reader, writer):
        await sent(writer, data)
        if draw.random() < 0.5 and writer.can_write_eof():
            writer.write_eof()
        return await http_status(reader, draw.uniform(0, HELD_S), SILENCE)


@kind("http: slow writer", 2)
async def slow_writer(target: Target, draw: random.Random) -> str:
    data = _whole(prompt="a", max_tokens=1)
    step = len(data) // draw.randint(3, 20) + 1
    async with connected(target.http_port) as (reader, writer):
        for start in range(0, len(data), step):
            await sent(writer, data[start : start + step])
            await asyncio.sleep(draw.uniform(0, 0.1))
        return await http_status(reader)


@kind("http: slow reader", 1)
async def slow_reader(target: Target, draw: random.Random) -> str:
    body = {"prompt": "def f", "stream": True, "provisional": True, "n": draw.randint(1, 2)}
    data = _whole(**body, max_tokens=16, block_size=4, ignore_eos=True)
    async with connected(target.http_port, abrupt=True, window=1024) as (reader, writer):
        await sent(writer, data)
        await asyncio.sleep(draw.uniform(0, HELD_S))
        if draw.random() < 0.5:
            return SILENCE
        status = await http_status(reader)
        for _ in range(draw.randint(0, 20)):
            await reader.read(draw.randint(1, 200))
            await asyncio.sleep(0.01)
        return status


@kind("http: half-open connection", 2)
async def half_open(target: Target, draw: random.Random) -> str:
    beginning = draw.choice(
        (b"", b"P", b"POST /v1/completions HTTP/1.1\r\n", _head()[:-2], _head())
    )
    async with connected(target.http_port, abrupt=draw.random() < 0.5) as (reader, writer):
        await sent(writer, beginning)
        return await ends(reader, draw.uniform(0, HELD_S))


async def _aborted(
    target: Target, draw: random.Random, pause_s: float, *, events: int = 0, **body: Any
) -> str:
    """Sends a completion and goes by RST: after so many events, and up to `pause_s` later."""
    async with connected(target.http_port, abrupt=True) as (reader, writer):
        await sent(writer, _whole(**body))
        status = await http_status(reader) if events else SILENCE
        for _ in range(events if status == "200" else 0):
            await reader.readuntil(b"\n\n")
        await asyncio.sleep(draw.uniform(0, pause_s))
        return status


# Long enough to be left in the middle, and each pass of it short.
_LONG = {"max_tokens": 64, "block_size": 4, "ignore_eos": True, "stream": True}


@kind("http: abort while connecting, after headers", 2)
async def abort_early(target: Target, draw: random.Random) -> str:
    async with connected(target.http_port, abrupt=True) as (_, writer):
        if draw.random() < 0.5:
            await sent(writer, _whole(prompt="a", max_tokens=1)[: draw.randint(1, 120)])
    return SILENCE


@kind("http: abort in the queue", 0.5)
async def abort_queued(target: Target, draw: random.Random) -> str:
    return await _aborted(target, draw, 0.02, prompt="def f", n=10, **_LONG)


@kind("http: abort in prefill", 0.7)
async def abort_prefill(target: Target, draw: random.Random) -> str:
    prompt = [draw.randrange(5, 2000) for _ in range(draw.randint(100, 250))]
    return await _aborted(target, draw, 0.1, prompt=prompt, **_LONG)


@kind("http: abort between blocks", 0.7)
async def abort_between(target: Target, draw: random.Random) -> str:
    events = draw.randint(1, 2)
    return await _aborted(target, draw, 0.0, events=events, prompt="def f", **_LONG)


@kind("http: abort in a block", 0.7)
async def abort_in_block(target: Target, draw: random.Random) -> str:
    body = {"provisional": True, **_LONG}
    return await _aborted(target, draw, 0.05, events=draw.randint(1, 3), prompt="def f", **body)


@kind("http: abort of an answer in one piece", 0.5)
async def abort_whole(target: Target, draw: random.Random) -> str:
    return await _aborted(target, draw, 0.2, prompt="def f", **{**_LONG, "stream": False})


@kind("http: pipelining", 2)
async def pipelined(target: Target, draw: random.Random) -> str:
    one = draw.choice(
        (_head("/health", method="GET"), _whole(prompt="a", max_tokens=1), b"x\r\n\r\n")
    )
    data = one * draw.randint(2, 10)
    async with connected(target.http_port, abrupt=draw.random() < 0.5) as (reader, writer):
        await sent(writer, data)
        return await http_status(reader) if draw.random() < 0.7 else SILENCE
