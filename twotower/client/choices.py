"""Streams of several completions of a prompt, which share a call until it is lost.

Each completion has its own seed in its `started`. What a lost call has left unfinished goes on as
requests for one completion each, one after the other; a call that has brought no token yet is made
again as it was.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Generic, TypeVar

import grpc

from twotower.client.messages import ServiceError
from twotower.client.streams import AsyncGenerationStream, GenerationStream, ended_by
from twotower.protos.v1 import generation_pb2 as pb
from twotower.towers.request.results import TextBlock

S = TypeVar("S", GenerationStream, AsyncGenerationStream)
Numbered = tuple[int, TextBlock]


class _Choices(Generic[S]):
    """The completions of a request and the call that receives them."""

    def __init__(self, stub: Any, request: pb.GenerateRequest, choices: Sequence[S]) -> None:
        self.choices: tuple[S, ...] = tuple(choices)
        self._stub = stub
        self._count = request.n
        self._call = self._begin()

    def cancel(self) -> None:
        """Ends the request; the service frees its rows. Does nothing after the end."""
        self._call.cancel()
        for choice in self.choices:
            choice.cancel()

    def _begin(self) -> Any:
        first = self.choices[0]
        request = first._next_request()
        request.n = self._count
        return self._stub.Generate(request, timeout=first._time_left())

    def _begin_again(self) -> None:
        """The same call once more, if it has brought nothing yet; otherwise the rest is left to
        the calls of single choices."""
        self._unfinished()[0]._check_wanted()
        if not self._brought_nothing():
            return
        self._call = self._begin()
        # Another thread may have cancelled the call before.
        if self.choices[0]._cancelled.is_set():
            self._call.cancel()

    def _brought_nothing(self) -> bool:
        return not any(each.token_ids or each.finish_reason for each in self.choices)

    def _unfinished(self) -> list[S]:
        return [choice for choice in self.choices if choice.finish_reason is None]

    def _pause_after(self, error: BaseException) -> float:
        """As Completion's, for all that is unfinished. Raises ServiceError."""
        self._call.cancel()
        self._unfinished()[0]._check_wanted()
        return self._unfinished()[0]._pause_after(error)

    def _take(self, response: pb.GenerateResponse) -> Numbered | None:
        if response.choice >= len(self.choices):
            text = f"a block of choice {response.choice} of {len(self.choices)}"
            raise ServiceError(grpc.StatusCode.UNKNOWN, text)
        block = self.choices[response.choice]._take(response)
        return None if block is None else (response.choice, block)

    def _check_end(self) -> None:
        for choice in self.choices:
            choice._check_end()


class ChoicesStream(_Choices[GenerationStream]):
    """Iterates over pairs of a completion's number and its next block.

    `choices` are the completions, each with the attributes of a GenerationStream, not to be
    iterated over. After a loss the unfinished ones go on one after the other.
    """

    def __init__(self, stub: Any, request: pb.GenerateRequest, *limits: float | None) -> None:
        choices = [GenerationStream(stub, _single(request), *limits) for _ in range(request.n)]
        super().__init__(stub, request, choices)

    def __iter__(self) -> Iterator[Numbered]:
        """Raises ServiceError."""
        try:
            while self._unfinished():
                try:
                    for response in self._call:
                        numbered = self._take(response)
                        if numbered is not None:
                            yield numbered
                    self._check_end()
                except (grpc.RpcError, ServiceError) as error:
                    if not self._unfinished():
                        break
                    waiting = self._unfinished()[0]
                    waiting._cancelled.wait(self._pause_after(error))
                    self._begin_again()
                    if not self._brought_nothing():
                        yield from self._one_by_one()
        finally:
            self.cancel()

    def _one_by_one(self) -> Iterator[Numbered]:
        for index, choice in enumerate(self.choices):
            if choice.finish_reason is None:
                for block in choice.begun():
                    yield index, block


class AsyncChoicesStream(_Choices[AsyncGenerationStream]):
    """As ChoicesStream, for `async for`. `cancel` it if you leave the loop before its end."""

    def __init__(self, stub: Any, request: pb.GenerateRequest, *limits: float | None) -> None:
        single = _single(request)
        choices = [AsyncGenerationStream(stub, single, *limits) for _ in range(request.n)]
        super().__init__(stub, request, choices)

    async def __aiter__(self) -> AsyncIterator[Numbered]:
        """Raises ServiceError."""
        try:
            while self._unfinished():
                try:
                    async for response in self._call:
                        numbered = self._take(response)
                        if numbered is not None:
                            yield numbered
                    self._check_end()
                except (grpc.RpcError, ServiceError, asyncio.CancelledError) as ended:
                    error = ended_by(ended)
                    if not self._unfinished():
                        break
                    await self._unfinished()[0]._sleep(self._pause_after(error))
                    self._begin_again()
                    if not self._brought_nothing():
                        async for numbered in self._one_by_one():
                            yield numbered
        finally:
            self.cancel()

    async def _one_by_one(self) -> AsyncIterator[Numbered]:
        for index, choice in enumerate(self.choices):
            if choice.finish_reason is None:
                async for block in choice.begun():
                    yield index, block


def _single(request: pb.GenerateRequest) -> pb.GenerateRequest:
    """The same request for one completion."""
    single = pb.GenerateRequest()
    single.CopyFrom(request)
    single.ClearField("n")
    return single
