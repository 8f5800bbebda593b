"""Clients of the service over gRPC, one that blocks and one for asyncio; need no torch, no ray."""

from __future__ import annotations

import asyncio
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Generic, TypeVar

import grpc
import grpc.aio

from twotower.client.channels import channel_options
from twotower.client.completion import Completion, Limits
from twotower.client.messages import (
    ModelInfo,
    Score,
    ServiceError,
    generate_request,
    model_info_of,
    score_of,
    score_request,
    service_error,
)
from twotower.client.wire_values import checked_seconds, checked_text
from twotower.protos.v1 import generation_pb2 as pb
from twotower.protos.v1 import generation_pb2_grpc
from twotower.towers.request.results import TextBlock
from twotower.towers.request.token_ids import Prompt, TokenIds

S = TypeVar("S")


class _Stream(Completion):
    """A completion with the call that it is received by now."""

    def __init__(
        self, stub: Any, request: pb.GenerateRequest, limits: Limits, cancelled: Any
    ) -> None:
        super().__init__(request, limits)
        self._stub = stub
        self._cancelled = cancelled
        self._call = self._begin()

    def cancel(self) -> None:
        """Ends the request; the service frees its row. Does nothing after the end."""
        self._cancelled.set()
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
    """Iterates over the blocks of one completion; Completion says what else it knows."""

    def __init__(self, stub: Any, request: pb.GenerateRequest, limits: Limits) -> None:
        super().__init__(stub, request, limits, threading.Event())

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

    def __init__(self, stub: Any, request: pb.GenerateRequest, limits: Limits) -> None:
        super().__init__(stub, request, limits, asyncio.Event())

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
                    error = _ended_by(ended)
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


class _Calls(ABC, Generic[S]):
    """What both clients have in common."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel
        self._stub: Any = generation_pb2_grpc.GenerationStub(channel)

    def generate(
        self,
        prompt: Prompt,
        *,
        mode: str | None = None,
        max_tokens: int | None = None,
        block_size: int | None = None,
        steps_per_block: int | None = None,
        confidence_threshold: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | None = None,
        ignore_eos: bool | None = None,
        draft_steps: int | None = None,
        min_tokens: int | None = None,
        min_steps_per_block: int | None = None,
        min_confidence_threshold: float | None = None,
        stop: Sequence[str] = (),
        logprobs: bool | None = None,
        generated_token_ids: TokenIds = (),
        request_id: str = "",
        timeout: float | None = None,
        resume: bool = True,
        resume_timeout: float = 60.0,
    ) -> S:
        """Starts a completion of a text or of token ids; None leaves the service's default.

        Ids are a list, an array or a tensor, [n] or [1, n].
        `stop` is a list of strings, `logprobs` asks for log-probabilities, `generated_token_ids`
        goes on with what an earlier program has received; `timeout` is in seconds, for the whole.
        `min_steps_per_block` and `min_confidence_threshold` are the floors down to which a service
        that has too much to do may go before it refuses; the stream tells what it was.
        With `resume` a stream whose service, router or connection is lost goes on by itself, for
        up to `resume_timeout` seconds from a loss to the next block (5 before the service has
        first answered); then the last error is raised. What was refused is not sent again, nor
        what has lost its server twice before that had begun. Raises InvalidRequestError for what
        a message cannot carry: ids and numbers that are none, or a whole number of more bits.
        """
        scalars = {
            "mode": mode,
            "max_tokens": max_tokens,
            "block_size": block_size,
            "steps_per_block": steps_per_block,
            "confidence_threshold": confidence_threshold,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "seed": seed,
            "ignore_eos": ignore_eos,
            "draft_steps": draft_steps,
            "min_tokens": min_tokens,
            "min_steps_per_block": min_steps_per_block,
            "min_confidence_threshold": min_confidence_threshold,
            "logprobs": logprobs,
        }
        request = generate_request(prompt, stop, generated_token_ids, request_id, scalars)
        timeout = checked_seconds("timeout", timeout)
        waits = checked_seconds("resume_timeout", resume_timeout)
        limits = Limits(timeout, resume, math.inf if waits is None else waits)
        return self._stream(request, limits)

    @abstractmethod
    def _stream(self, request: pb.GenerateRequest, limits: Limits) -> S:
        """Starts a stream."""


class Client(_Calls[GenerationStream]):
    """Calls one service; `target` is `host:port`. Use it as a context manager or `close` it.

    `credentials` (as of `grpc.ssl_channel_credentials`) are for a service behind TLS.
    """

    def __init__(self, target: str, credentials: grpc.ChannelCredentials | None = None) -> None:
        checked_text("target", target)
        super().__init__(
            grpc.insecure_channel(target, options=channel_options(target))
            if credentials is None
            else grpc.secure_channel(target, credentials, options=channel_options(target))
        )

    def score(self, text: Prompt, *, timeout: float | None = None) -> Score:
        """Log-probabilities of a text or of token ids ([n] or [1, n]). Raises ServiceError, and
        InvalidRequestError for ids that are none."""
        with _plain_errors():
            return score_of(self._stub.Score(score_request(text), timeout=_seconds(timeout)))

    def model_info(self, *, timeout: float | None = None) -> ModelInfo:
        """What is served. Raises ServiceError."""
        with _plain_errors():
            return model_info_of(
                self._stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=_seconds(timeout))
            )

    def close(self) -> None:
        """Ends all calls and the connection."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _stream(self, request: pb.GenerateRequest, limits: Limits) -> GenerationStream:
        return GenerationStream(self._stub, request, limits)


class AsyncClient(_Calls[AsyncGenerationStream]):
    """As Client, for asyncio; make it where the event loop runs."""

    def __init__(self, target: str, credentials: grpc.ChannelCredentials | None = None) -> None:
        checked_text("target", target)
        super().__init__(
            grpc.aio.insecure_channel(target, options=channel_options(target))
            if credentials is None
            else grpc.aio.secure_channel(target, credentials, options=channel_options(target))
        )

    async def score(self, text: Prompt, *, timeout: float | None = None) -> Score:
        """As Client.score."""
        with _plain_errors():
            return score_of(await self._stub.Score(score_request(text), timeout=_seconds(timeout)))

    async def model_info(self, *, timeout: float | None = None) -> ModelInfo:
        """As Client.model_info."""
        with _plain_errors():
            call = self._stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=_seconds(timeout))
            return model_info_of(await call)

    async def close(self) -> None:
        """Ends all calls and the connection."""
        await self._channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def _stream(self, request: pb.GenerateRequest, limits: Limits) -> AsyncGenerationStream:
        return AsyncGenerationStream(self._stub, request, limits)


def _seconds(timeout: float | None) -> float | None:
    return checked_seconds("timeout", timeout)


@contextmanager
def _plain_errors() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise service_error(error) from None


def _ended_by(error: BaseException) -> BaseException:
    """The error that ended a stream of grpc.aio: it raises CancelledError for a status, too."""
    if not isinstance(error, asyncio.CancelledError):
        return error
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise error
    return ServiceError(grpc.StatusCode.CANCELLED, "cancelled by the service")
