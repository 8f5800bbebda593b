"""Streams in the proxy end with their call, at whatever moment that ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from twotower.deployments.ingress import MAX_UNREAD, add_generation, watched


class Context:
    """A call's context that forgets its peer when the call ends, as gRPC's does."""

    def __init__(self) -> None:
        self.callbacks: list[Callable[[Any], None]] = []
        self.over = False
        self.status = grpc.StatusCode.OK

    def peer(self) -> str:
        assert not self.over, "reading this after the call has ended crashes the process"
        return "ipv4:127.0.0.1:5"

    peer_identities = auth_context = peer

    def code(self) -> int:
        return 7

    def set_code(self, code: grpc.StatusCode) -> None:
        self.status = code

    def set_details(self, details: str) -> None:
        assert "/" not in details

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


async def test_errors_pass() -> None:
    stream = watched(Source(4, fails=True))(None, Context())
    assert [await anext(stream) for _ in range(4)] == [bytes([index]) for index in range(4)]
    with pytest.raises(RuntimeError, match="source"):
        await anext(stream)


async def test_a_call_that_ends_between_two_messages_cancels_its_source() -> None:
    source, context = Source(2), Context()
    stream = watched(source)(None, context)
    assert await anext(stream) == b"\0"
    context.end()
    await asyncio.sleep(0.01)
    assert source.ended == "cancelled ipv4:127.0.0.1:5 7"
    await stream.aclose()


async def test_a_client_that_does_not_read_is_cancelled() -> None:
    source, context = Source(2 * MAX_UNREAD, pauses=True), Context()
    stream = watched(source)(None, context)
    assert await anext(stream) == b"\0"
    while not source.ended:
        await asyncio.sleep(0)
    assert source.ended.startswith("cancelled")
    assert context.status == grpc.StatusCode.RESOURCE_EXHAUSTED
    left = [message async for message in stream]
    assert MAX_UNREAD <= len(left) <= MAX_UNREAD + 1


class Kind:
    def __init__(self, value: str) -> None:
        self.value = value


class Server:
    """Makes handlers through its factory whenever a service is added, as Serve's server does."""

    def __init__(self) -> None:
        self.made: dict[str, Any] = {}
        self.service_handler_factory: Callable[..., Any] = self.make

    @staticmethod
    def make(service_method: str, streaming_type: Kind) -> Any:
        return (service_method, streaming_type.value)

    def add_generic_rpc_handlers(self, _handlers: Any) -> None:
        for kind in ("unary_unary", "unary_stream"):
            self.made[kind] = self.service_handler_factory(
                service_method="/m", streaming_type=Kind(kind)
            )

    def add_registered_method_handlers(self, _name: str, _handlers: Any) -> None:
        pass


class Servicer:
    Generate = Score = GetModelInfo = None


def test_only_server_streams_are_watched() -> None:
    server = Server()
    add_generation(Servicer(), server)
    assert server.made["unary_unary"] == ("/m", "unary_unary")
    assert callable(server.made["unary_stream"])
    assert server.service_handler_factory == server.make
