"""Streams of a client: a completion and the gRPC call that receives it now."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import Any, Self

import grpc

from twotower.client.completion import Completion
from twotower.client.messages import ServiceError
from twotower.protos.v1 import generation_pb2 as pb
from twotower.towers.request.results import TextBlock


class _Stream(Completion):
    """A completion and the call that receives it now, if it has one of its own."""

    def __init__(
        self, cancelled: Any, stub: Any, request: pb.GenerateRequest, *limits: float | None
    ) -> None:
        super().__init__(request, *limits)
        self._stub = stub
        self._cancelled = cancelled
        self._call: Any = None

    def begun(self) -> Self:
        """This stream, whose first call has begun."""
        self._call = self._begin()
        return self

    def cancel(self) -> None:
        """Ends the request; the service frees its row. Does nothing after the end."""
        self._cancelled.set()
        if self._call is not None:
            self._call.cancel()

    def _begin(self) -> Any:
        return self._stub.Generate(self._next_request(), timeout=self._time_left())

    def _begin_again(self) -> None:
        self._check_wanted()
        self._call = self._begin()
        # Another thread may have cancelled the call before.
        if self._cancelled.is_set():
            self._call.cancel()

    def _check_wanted(self) -> None:
        if self._cancelled.is_set():
            raise ServiceError(grpc.StatusCode.CANCELLED, "cancelled by this client") from None


class GenerationStream(_Stream):
    """Iterates over the blocks of a completion; its other attributes are those of Completion."""

    def __init__(self, stub: Any, request: pb.GenerateRequest, *limits: float | None) -> None:
        super().__init__(threading.Event(), stub, request, *limits)

    def __iter__(self) -> Iterator[TextBlock]:
        """Raises ServiceError."""
        try:
            while self.finish_reason is None:
                try:
                    for response in self._call:
                        block = self._take(response)
                        if block is not None:
                            yield block
                    self._check_end()
                except (grpc.RpcError, ServiceError) as error:
                    if self.finish_reason is not None:
                        break
                    self._call.cancel()
                    self._check_wanted()
                    self._cancelled.wait(self._pause_after(error))
                    self._begin_again()
        finally:
            self.cancel()


class AsyncGenerationStream(_Stream):
    """As GenerationStream, for `async for`. `cancel` it if you leave the loop before its end."""

    def __init__(self, stub: Any, request: pb.GenerateRequest, *limits: float | None) -> None:
        super().__init__(asyncio.Event(), stub, request, *limits)

    async def __aiter__(self) -> AsyncIterator[TextBlock]:
        """Raises ServiceError."""
        try:
            while self.finish_reason is None:
                try:
                    async for response in self._call:
                        block = self._take(response)
                        if block is not None:
                            yield block
                    self._check_end()
                except (grpc.RpcError, ServiceError, asyncio.CancelledError) as ended:
                    error = ended_by(ended)
                    if self.finish_reason is not None:
                        break
                    self._call.cancel()
                    self._check_wanted()
                    await self._sleep(self._pause_after(error))
                    self._begin_again()
        finally:
            self.cancel()

    async def _sleep(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._cancelled.wait(), seconds)


def ended_by(error: BaseException) -> BaseException:
    """The error that ended a stream of grpc.aio: it raises CancelledError for a status, too."""
    if not isinstance(error, asyncio.CancelledError):
        return error
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise error
    return ServiceError(grpc.StatusCode.CANCELLED, "cancelled by the service")
