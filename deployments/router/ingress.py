"""The gRPC services inside Serve's proxy, with a few repairs.

The proxy notices that a client has gone only while it waits for the next message of a stream. If
the client goes while a message is being sent, the request runs on to its end unread. Here
each stream is read by a task of its own, which always waits for the next message, and which ends
with the call, however that ends. And what a client leaves unread is bounded: Serve would keep it
all, here the request of a client that does not read is cancelled.

A message that is too long or none at all is refused before Serve sees it, and what Serve says of an
exception (of a router that has died: its class, actor, process and address) is replaced by a fixed
sentence: clients read only what was made for them.

Every call has a name and a trace, its client's or drawn ones, which the router and the client read
in metadata (`x-request-id`, `traceparent`).

Serve calls these functions in every proxy process, by the names in `SERVICER_FUNCTIONS`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc

from twotower.deployments.router.call_context import CallContext
from twotower.protos.incoming import CarefulServer, message_limit
from twotower.protos.kserve import inference_pb2_grpc
from twotower.protos.v1 import generation_pb2_grpc

SERVICER_FUNCTIONS = [
    "twotower.deployments.router.ingress.add_generation",
    "twotower.deployments.router.ingress.add_inference",
    "twotower.deployments.router.ingress.add_health",
]
StreamHandler = Callable[[Any, Any], AsyncIterator[bytes]]
UnaryHandler = Callable[[Any, Any], Awaitable[bytes]]
MAX_UNREAD = 1024
_UNREAD_TEXT = "the client reads too slowly; resume with generated_token_ids"
_END = object()


def add_generation(servicer: Any, server: Any) -> None:
    """Registers twotower.v1.Generation."""
    _add(generation_pb2_grpc.add_GenerationServicer_to_server, servicer, server)


def add_inference(servicer: Any, server: Any) -> None:
    """Registers inference.GRPCInferenceService."""
    _add(inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server, servicer, server)


def add_health(servicer: Any, server: Any) -> None:
    """Registers grpc.health.v1.Health."""
    _add(health_pb2_grpc.add_HealthServicer_to_server, servicer, server)


def guarded(handler: UnaryHandler) -> Callable[[Any, Any], Awaitable[bytes]]:
    """A unary handler that gives nothing away, and is not reached by what is no message."""

    async def answer(request: Any, context: Any) -> bytes:
        call = CallContext(context, request)
        message = await _answered(handler, request, call)
        await call.send_names()
        return message

    return answer


async def _answered(handler: UnaryHandler, request: Any, call: CallContext) -> bytes:
    if call.refusal is not None:
        call.refuse(call.refusal)
        return b""
    try:
        return await handler(request, call)
    except Exception as error:
        call.fail(error)
        return b""


def watched(handler: StreamHandler) -> Callable[[Any, Any], AsyncGenerator[bytes, None]]:
    """As `guarded` for a server stream, which is cancelled where it waits as soon as its call is
    over. What a client streams is read only as its handler asks for it; a message that is none
    reaches the handler as a Refusal."""

    async def stream(request: Any, context: Any) -> AsyncGenerator[bytes, None]:
        messages: asyncio.Queue[Any] = asyncio.Queue()
        call = CallContext(context, request)
        if call.refusal is not None:
            call.refuse(call.refusal)
            await call.send_names()
            return
        reader = asyncio.ensure_future(_read(handler(request, call), messages, call))
        # Not a `finally`: a generator that is dropped while its message is sent runs none in time.
        context.add_done_callback(lambda _: reader.cancel())
        while (message := await messages.get()) is not _END:
            await call.send_names()
            yield message
        await asyncio.wait([reader])
        error = None if reader.cancelled() else reader.exception()
        if isinstance(error, Exception):
            call.fail(error)
        await call.send_names()

    return stream


async def _read(
    source: AsyncIterator[bytes], messages: asyncio.Queue[Any], call: CallContext
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
        # Serve makes all four kinds of each method; ours are of these three.
        return handler if wrap is None else wrap(handler)

    server.service_handler_factory = make
    try:
        register(servicer, CarefulServer(server, message_limit(os.environ)))
    finally:
        server.service_handler_factory = make_handler


_WRAPPED: dict[str, Callable[[Any], Any]] = {
    "unary_unary": guarded,
    "unary_stream": watched,
    "stream_stream": watched,
}
