"""Our services inside Serve's gRPC proxy, with two repairs.

The proxy notices that a client has gone only while it waits for the next message of a stream. If
the client goes while a message is being sent, the request runs on to its end for nobody. Here
each stream is read by a task of its own, which always waits for the next message, and which ends
with the call, however that ends. And what a client leaves unread is bounded: Serve would keep it
all, here the request of a client that does not read is cancelled.

Serve calls these functions in every proxy process, by the names in `SERVICER_FUNCTIONS`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc

from twotower.protos.v1 import generation_pb2_grpc

SERVICER_FUNCTIONS = [
    "twotower.deployments.ingress.add_generation",
    "twotower.deployments.ingress.add_health",
]
Handler = Callable[[Any, Any], AsyncIterator[bytes]]
MAX_UNREAD = 1024
_UNREAD_TEXT = "the client reads too slowly; resume with generated_token_ids"
_END = object()


def add_generation(servicer: Any, server: Any) -> None:
    """Registers twotower.v1.Generation."""
    _add(generation_pb2_grpc.add_GenerationServicer_to_server, servicer, server)


def add_health(servicer: Any, server: Any) -> None:
    """Registers grpc.health.v1.Health."""
    _add(health_pb2_grpc.add_HealthServicer_to_server, servicer, server)


class CallContext:
    """A call's context that outlives the call: the peer's names are read while there is one."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._peer = context.peer()
        self._peer_identities = context.peer_identities()
        self._auth_context = context.auth_context()

    def peer(self) -> Any:
        """The client's address."""
        return self._peer

    def peer_identities(self) -> Any:
        """The client's identities, if it has shown a certificate."""
        return self._peer_identities

    def auth_context(self) -> Any:
        """What the transport knows of the client."""
        return self._auth_context

    def __getattr__(self, name: str) -> Any:
        # All else lives in Python and may be used after the call has ended.
        return getattr(self._context, name)


def watched(handler: Handler) -> Callable[[Any, Any], AsyncGenerator[bytes, None]]:
    """A server-stream handler that is cancelled where it waits as soon as its call is over."""

    async def stream(request: Any, context: Any) -> AsyncGenerator[bytes, None]:
        messages: asyncio.Queue[Any] = asyncio.Queue()
        call = CallContext(context)
        reader = asyncio.ensure_future(_read(handler(request, call), messages, call))
        # Not a `finally`: a generator that is dropped while its message is sent runs none in time.
        context.add_done_callback(lambda _: reader.cancel())
        while (message := await messages.get()) is not _END:
            yield message
        await asyncio.wait([reader])
        if not reader.cancelled():
            reader.result()

    return stream


async def _read(
    source: AsyncIterator[bytes], messages: asyncio.Queue[Any], call: CallContext
) -> None:
    own = asyncio.current_task()
    assert own is not None
    try:
        async for message in source:
            messages.put_nowait(message)
            if messages.qsize() > MAX_UNREAD and not own.cancelling():
                call.set_code(grpc.StatusCode.RESOURCE_EXHAUSTED)
                call.set_details(_UNREAD_TEXT)
                own.cancel()
    finally:
        messages.put_nowait(_END)


def _add(register: Callable[[Any, Any], Any], servicer: Any, server: Any) -> None:
    """Registers a service while the server makes its handlers through `watched`."""
    make_handler = server.service_handler_factory

    def make(service_method: str, streaming_type: Any) -> Any:
        handler = make_handler(service_method=service_method, streaming_type=streaming_type)
        return watched(handler) if streaming_type.value == "unary_stream" else handler

    server.service_handler_factory = make
    try:
        register(servicer, server)
    finally:
        server.service_handler_factory = make_handler
