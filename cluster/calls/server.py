"""The answering side: a gRPC server in a tower's process that makes the calls of its pair."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio
import msgspec

from twotower.cluster.calls.messages import (
    Answer,
    CallTypes,
    Failure,
    Request,
    joined,
    packed,
    packed_value,
)
from twotower.cluster.calls.stream import (
    ADMITTED_KEY,
    METHOD,
    OPTIONS,
    TOKEN_KEY,
    CallAddress,
)
from twotower.cluster.channel.peers import add_port, shows
from twotower.cluster.channel.tls import Identity
from twotower.towers.errors import TwoTowerError

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
# The tower of a side; of None where a process holds one.
Target = Callable[[str | None], object]
_REQUESTS = msgspec.msgpack.Decoder(list[Request])
_NOTHING = packed_value(None)
# Cut short, a release would leave what its row holds: these end whatever becomes of their stream.
_RELEASE = ".release"
_RELEASES: set[asyncio.Task[None]] = set()


class CallServer:
    """Answers calls of `types` by methods of the towers that `target` gives.

    A call that fails otherwise than by an error of towers/errors.py is logged here. With an
    `identity` streams are taken over TLS only.
    """

    def __init__(self, target: Target, types: CallTypes, identity: Identity | None = None) -> None:
        self._target = target
        self._types = types
        self._identity = identity
        self._token = secrets.token_hex(16)
        self._server: grpc.aio.Server | None = None

    async def start(self, host: str) -> CallAddress:
        """Listens on a free port of `host`."""
        self._server = grpc.aio.server(options=OPTIONS)
        service, method = METHOD.strip("/").split("/")
        handler = grpc.stream_stream_rpc_method_handler(self._serve)
        handlers = grpc.method_handlers_generic_handler(service, {method: handler})
        self._server.add_generic_rpc_handlers((handlers,))
        address = add_port(self._server, host, self._identity)
        await self._server.start()
        certificate = None if self._identity is None else self._identity.certificate
        return CallAddress(address, self._token, certificate)

    async def stop(self) -> None:
        """Ends all streams and stops to listen."""
        if self._server is not None:
            await self._server.stop(grace=None)

    async def _serve(self, messages: AsyncIterator[bytes], context: Context) -> None:
        """Serves one stream until it ends; what it has asked for then ends too."""
        metadata = dict(context.invocation_metadata() or ())
        if not shows(metadata, TOKEN_KEY, self._token.encode()):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong or missing token")
        await context.send_initial_metadata(((ADMITTED_KEY, "1"),))
        stream = _Answers(self._target, self._types, context)
        try:
            async for message in messages:
                for request in _REQUESTS.decode(message):
                    stream.begin(request)
        except msgspec.MsgspecError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        finally:
            stream.end()


class _Answers:
    """The calls of one stream that are under way, and answers that are not sent yet."""

    def __init__(self, target: Target, types: CallTypes, context: Context) -> None:
        self._target = target
        self._types = types
        self._context = context
        self._calls: set[asyncio.Task[None]] = set()
        self._unsent: list[msgspec.Raw] = []
        self._sending: asyncio.Task[None] | None = None

    def begin(self, request: Request) -> None:
        """Begins a call, in the order in which they were sent."""
        task = asyncio.create_task(self._answer(request))
        calls = _RELEASES if request.call.endswith(_RELEASE) else self._calls
        calls.add(task)
        task.add_done_callback(calls.discard)

    def end(self) -> None:
        """Gives up what is under way, as nobody waits for it any more, but lets releases end."""
        for task in self._calls:
            task.cancel()
        if self._sending is not None:
            self._sending.cancel()

    async def _answer(self, request: Request) -> None:
        try:
            arguments = self._types.arguments(request.call, request.arguments)
            method = getattr(self._target(request.side), request.call.rpartition(".")[2])
            answer = packed(Answer(request.number, packed_value(await method(*arguments))))
        except TwoTowerError as error:
            answer = packed(Answer(request.number, _NOTHING, Failure.of(error)))
        except Exception as error:
            logger.exception("a call of a tower failed: %s", request.call)
            answer = packed(Answer(request.number, _NOTHING, Failure.of(error)))
        self._unsent.append(answer)
        if self._sending is None:
            self._sending = asyncio.create_task(self._send())

    async def _send(self) -> None:
        """Sends what is there until nothing is left; what comes meanwhile goes together."""
        try:
            while self._unsent:
                answers, self._unsent = self._unsent, []
                await self._context.write(joined(answers))
        except (grpc.aio.BaseError, grpc.RpcError, asyncio.InvalidStateError):
            # The stream is over, which its reader sees as well.
            self._unsent.clear()
        finally:
            self._sending = None
