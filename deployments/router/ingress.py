"""The gRPC services inside Serve's proxy, with a few repairs.

The proxy notices that a client has gone only while it waits for the next message of a stream. If
the client goes while a message is being sent, the request runs on to its end unread. Here
each stream is read by a task of its own, which always waits for the next message, and which ends
with the call, however that ends. And what a client leaves unread is bounded: Serve would keep it
all, here the request of a client that does not read is cancelled.

A message that is too long or none at all is refused before Serve sees it, and what Serve says of an
exception (of a router that has died: its class, actor, process and address) is replaced by a fixed
sentence: clients read only what was made for them.

Serve calls these functions in every proxy process, by the names in `SERVICER_FUNCTIONS`.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc

from twotower.protos.incoming import CarefulServer, Refusal, message_limit
from twotower.protos.refusals import LOST_TEXT, marked, shown
from twotower.protos.v1 import generation_pb2_grpc

logger = logging.getLogger("ray.serve")

SERVICER_FUNCTIONS = [
    "twotower.deployments.router.ingress.add_generation",
    "twotower.deployments.router.ingress.add_health",
]
StreamHandler = Callable[[Any, Any], AsyncIterator[bytes]]
UnaryHandler = Callable[[Any, Any], Awaitable[bytes]]
MAX_UNREAD = 1024
_UNREAD_TEXT = "the client reads too slowly; resume with generated_token_ids"
_CODES = {code.value[0]: code for code in grpc.StatusCode}
_END = object()


def add_generation(servicer: Any, server: Any) -> None:
    """Registers twotower.v1.Generation."""
    _add(generation_pb2_grpc.add_GenerationServicer_to_server, servicer, server)


def add_health(servicer: Any, server: Any) -> None:
    """Registers grpc.health.v1.Health."""
    _add(health_pb2_grpc.add_HealthServicer_to_server, servicer, server)


class _CallContext:
    """A call's context that outlives the call: the peer's names are read while there is one.

    Its status says what was made for clients and nothing else.
    """

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
        """The transport's properties of the client."""
        return self._auth_context

    def set_details(self, details: str) -> None:
        """Sets the text of the status, whose code has been set, to what a client may read."""
        given = self._context.code()
        known = given if isinstance(given, grpc.StatusCode) else _CODES[int(given or 0)]
        code, text = shown(known, details)
        self._context.set_code(code)
        self._context.set_details(text)

    def refuse(self, refusal: Refusal) -> None:
        """Ends the call, when its handler does, as one whose message was not taken."""
        self.end(grpc.StatusCode.INVALID_ARGUMENT, refusal.details)

    def fail(self, error: Exception) -> None:
        """Ends the call as lost by an error here, which only the log names."""
        logger.error("a call failed in the proxy", exc_info=error)
        self.end(grpc.StatusCode.UNAVAILABLE, LOST_TEXT)

    def end(self, code: grpc.StatusCode, details: str) -> None:
        """Sets a status whose text was made for clients."""
        self._context.set_code(code)
        self.set_details(marked(details))

    def __getattr__(self, name: str) -> Any:
        # All else lives in Python and may be used after the call has ended.
        return getattr(self._context, name)


def guarded(handler: UnaryHandler) -> Callable[[Any, Any], Awaitable[bytes]]:
    """A unary handler that gives nothing away, and is not reached by what is no message."""

    async def answer(request: Any, context: Any) -> bytes:
        call = _CallContext(context)
        if isinstance(request, Refusal):
            call.refuse(request)
            return b""
        try:
            return await handler(request, call)
        except Exception as error:
            call.fail(error)
            return b""

    return answer


def watched(handler: StreamHandler) -> Callable[[Any, Any], AsyncGenerator[bytes, None]]:
    """As `guarded` for a server stream, which is cancelled where it waits as soon as its call is
    over."""

    async def stream(request: Any, context: Any) -> AsyncGenerator[bytes, None]:
        messages: asyncio.Queue[Any] = asyncio.Queue()
        call = _CallContext(context)
        if isinstance(request, Refusal):
            call.refuse(request)
            return
        reader = asyncio.ensure_future(_read(handler(request, call), messages, call))
        # Not a `finally`: a generator that is dropped while its message is sent runs none in time.
        context.add_done_callback(lambda _: reader.cancel())
        while (message := await messages.get()) is not _END:
            yield message
        await asyncio.wait([reader])
        error = None if reader.cancelled() else reader.exception()
        if isinstance(error, Exception):
            call.fail(error)

    return stream


async def _read(
    source: AsyncIterator[bytes], messages: asyncio.Queue[Any], call: _CallContext
) -> None:
    task = asyncio.current_task()
    assert task is not None
    try:
        async for message in source:
            messages.put_nowait(message)
            if messages.qsize() > MAX_UNREAD and not task.cancelling():
                call.end(grpc.StatusCode.RESOURCE_EXHAUSTED, _UNREAD_TEXT)
                task.cancel()
    finally:
        messages.put_nowait(_END)


def _add(register: Callable[[Any, Any], Any], servicer: Any, server: Any) -> None:
    """Registers a service while the server makes its handlers through the functions above."""
    make_handler = server.service_handler_factory

    def make(service_method: str, streaming_type: Any) -> Any:
        handler = make_handler(service_method=service_method, streaming_type=streaming_type)
        wrap = _WRAPPED.get(streaming_type.value)
        # Generated code makes all four kinds of each method; ours are of these two.
        return handler if wrap is None else wrap(handler)

    server.service_handler_factory = make
    try:
        register(servicer, CarefulServer(server, message_limit(os.environ)))
    finally:
        server.service_handler_factory = make_handler


_WRAPPED: dict[str, Callable[[Any], Any]] = {"unary_unary": guarded, "unary_stream": watched}
