"""The calling side: one gRPC stream from a pair to a tower's process, with all rows' calls.

A call as a task of an actor costs both processes several times what a message on a stream does.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import msgspec

from twotower.cluster.calls.messages import (
    Answer,
    CallTypes,
    Request,
    joined,
    packed,
    packed_arguments,
)
from twotower.cluster.channel.peers import channel_to, retrieve
from twotower.towers.errors import UnavailableError

METHOD = "/twotower.v1.TowerCalls/Make"
TOKEN_KEY = "twotower-calls-token"
ADMITTED_KEY = "twotower-calls-admitted"
# A machine that is lost without a word is noticed after the two together.
KEEPALIVE_MS, KEEPALIVE_TIMEOUT_MS = 10_000, 10_000
# Above a prompt of the longest context, whose ids take up to 5 bytes.
MOST_BYTES = 256 << 20
OPEN_TIMEOUT_S = 10.0
# After a stream that did not open, calls fail at once for so long.
REST_S = 1.0
OPTIONS = [
    ("grpc.max_send_message_length", MOST_BYTES),
    ("grpc.max_receive_message_length", MOST_BYTES),
    ("grpc.enable_http_proxy", 0),
    ("grpc.so_reuseport", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
]
_GONE = "a tower that held the request is gone; try again"
_ANSWERS = msgspec.msgpack.Decoder(list[Answer])
_Broken = (grpc.aio.AioRpcError, asyncio.InvalidStateError)


@dataclass(frozen=True)
class CallAddress:
    """Where a tower's process answers calls (`host:port`), the secret that it asks for, and its
    certificate (PEM), for a stream over TLS; None: over plain TCP."""

    address: str
    token: str = field(repr=False)
    certificate: bytes | None = field(default=None, repr=False)


class CallStream:
    """Calls of the towers of a process; use it from one event loop only.

    A stream that breaks fails the calls that wait; the next call opens another, and calls that come
    meanwhile share its fate.
    """

    def __init__(self, target: CallAddress, types: CallTypes) -> None:
        self._target = target
        self._types = types
        self._numbers = itertools.count()
        self._stream: _Stream | None = None
        self._opening: asyncio.Task[_Stream] | None = None
        self._gone_until = 0.0
        self._closed = False

    def carries(self, call: str) -> bool:
        """Whether calls of that name go over the stream."""
        return call in self._types

    async def open(self) -> None:
        """Opens the stream, if it is not open. Raises UnavailableError."""
        await self._opened()

    async def make(self, side: str | None, call: str, arguments: Sequence[object]) -> Any:
        """The value of a call. Raises what the tower raised, UnavailableError if it is gone."""
        stream = self._stream
        if stream is None or stream.broken:
            stream = await self._opened()
        number = next(self._numbers)
        request = packed(Request(number, side, call, packed_arguments(arguments)))
        answer = await stream.answer(number, request)
        if answer.failure is not None:
            raise answer.failure.error()
        return self._types.value(call, answer.value)

    async def close(self) -> None:
        """Ends the stream for good; calls that wait fail."""
        self._closed = True
        if self._stream is not None:
            await self._stream.close()

    async def _opened(self) -> _Stream:
        if self._stream is not None and not self._stream.broken:
            return self._stream
        if self._closed or asyncio.get_running_loop().time() < self._gone_until:
            raise UnavailableError(_GONE)
        if self._opening is None:
            self._opening = asyncio.create_task(self._open(), context=contextvars.Context())
            self._opening.add_done_callback(retrieve)
        return await asyncio.shield(self._opening)

    async def _open(self) -> _Stream:
        try:
            if self._stream is not None:
                await self._stream.close()
            stream = _Stream(self._target)
            await stream.open()
        except UnavailableError:
            self._gone_until = asyncio.get_running_loop().time() + REST_S
            raise
        finally:
            self._opening = None
        self._stream = stream
        if self._closed:
            await stream.close()
        return stream


class _Stream:
    """One gRPC stream, from its opening until it breaks."""

    def __init__(self, target: CallAddress) -> None:
        self.broken = False
        self._channel = channel_to(target.address, target.certificate, OPTIONS)
        make: Any = self._channel.stream_stream(METHOD, None, None)
        self._call = make(metadata=((TOKEN_KEY, target.token),))
        self._waiting: dict[int, asyncio.Future[Answer]] = {}
        self._unsent: list[msgspec.Raw] = []
        self._sending: asyncio.Task[None] | None = None
        self._reading: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Waits until the tower's process has taken the stream. Raises UnavailableError."""
        metadata: dict[str, Any] = {}
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                metadata = dict(await self._call.initial_metadata() or ())
        except (TimeoutError, *_Broken):
            # Said below, whatever the reason.
            pass
        finally:
            if ADMITTED_KEY not in metadata:
                await self.close()
        if ADMITTED_KEY not in metadata:
            raise UnavailableError(_GONE)
        self._reading = asyncio.create_task(self._read())

    async def answer(self, number: int, request: msgspec.Raw) -> Answer:
        """Sends a request and waits for its answer."""
        if self.broken:
            raise UnavailableError(_GONE)
        waiting: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[number] = waiting
        self._unsent.append(request)
        if self._sending is None:
            self._sending = asyncio.create_task(self._send())
        try:
            return await waiting
        finally:
            self._waiting.pop(number, None)

    async def close(self) -> None:
        """Ends the stream."""
        self._break()
        tasks = [task for task in (self._sending, self._reading) if task is not None]
        try:
            await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            await self._channel.close(grace=None)

    async def _send(self) -> None:
        """Sends what is there until nothing is left; what comes meanwhile goes together."""
        try:
            while self._unsent:
                requests, self._unsent = self._unsent, []
                await self._call.write(joined(requests))
        except _Broken:
            self._break()
        finally:
            self._sending = None

    async def _read(self) -> None:
        try:
            async for message in self._call:
                for answer in _ANSWERS.decode(message):
                    waiting = self._waiting.get(answer.number)
                    if waiting is not None and not waiting.done():
                        waiting.set_result(answer)
        except _Broken:
            # The end of the stream says nothing that its calls need to know.
            pass
        finally:
            self._break()

    def _break(self) -> None:
        self.broken = True
        self._call.cancel()
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(UnavailableError(_GONE))
