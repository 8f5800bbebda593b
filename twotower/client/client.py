"""Clients of the service over gRPC, a blocking one and one for asyncio, without torch and Ray."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Generic, TypeVar

import grpc
import grpc.aio

from twotower.client.channels import channel_options
from twotower.client.keys import KeyedChannel, checked_key
from twotower.client.messages import (
    ModelInfo,
    Score,
    generate_request,
    model_info_of,
    score_of,
    score_request,
    service_error,
)
from twotower.client.streams import AsyncGenerationStream, GenerationStream
from twotower.client.wire_values import checked_seconds, checked_text
from twotower.protos.v1 import generation_pb2 as pb
from twotower.protos.v1 import generation_pb2_grpc
from twotower.towers.request.token_ids import Prompt, TokenIds

S = TypeVar("S")


class _Calls(ABC, Generic[S]):
    """Starts completions, by the stub of a channel."""

    def __init__(self, channel: Any, api_key: str | None) -> None:
        self._channel = channel if api_key is None else KeyedChannel(channel, api_key)
        self._stub: Any = generation_pb2_grpc.GenerationStub(self._channel)

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
        with a long queue may go; the stream has the values that were used.
        With `resume` a stream whose service, router or connection is lost goes on by itself, for
        up to `resume_timeout` seconds from a loss to the next block (5 before the service has
        first answered); then the last error is raised. A request that was refused is not sent
        again, nor one that has twice lost its server before it had begun. Raises
        InvalidRequestError for values that the message cannot hold.
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
        waits = math.inf if waits is None else waits
        return self._stream(request, timeout, waits if resume else None)

    @abstractmethod
    def _stream(self, request: pb.GenerateRequest, *limits: float | None) -> S:
        """Starts a stream; `limits` are those of Completion, in seconds."""


class Client(_Calls[GenerationStream]):
    """Calls one service; `target` is `host:port`. Use it as a context manager or `close` it.

    `credentials` (as of `grpc.ssl_channel_credentials`) are for a service behind TLS. `api_key`
    goes with every call, for a service that asks for one; without TLS everybody on the way can read
    it.
    """

    def __init__(
        self,
        target: str,
        credentials: grpc.ChannelCredentials | None = None,
        api_key: str | None = None,
    ) -> None:
        _check(target, api_key)
        super().__init__(
            grpc.insecure_channel(target, options=channel_options(target))
            if credentials is None
            else grpc.secure_channel(target, credentials, options=channel_options(target)),
            api_key,
        )

    def score(self, text: Prompt, *, timeout: float | None = None) -> Score:
        """Log-probabilities of a text or of token ids ([n] or [1, n]). Raises ServiceError, and
        InvalidRequestError for invalid ids."""
        with _plain_errors():
            return score_of(self._stub.Score(score_request(text), timeout=_seconds(timeout)))

    def model_info(self, *, timeout: float | None = None) -> ModelInfo:
        """Model, limits and modes of the service. Raises ServiceError."""
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

    def _stream(self, request: pb.GenerateRequest, *limits: float | None) -> GenerationStream:
        return GenerationStream(self._stub, request, *limits)


class AsyncClient(_Calls[AsyncGenerationStream]):
    """As Client, for asyncio; make it where the event loop runs."""

    def __init__(
        self,
        target: str,
        credentials: grpc.ChannelCredentials | None = None,
        api_key: str | None = None,
    ) -> None:
        _check(target, api_key)
        super().__init__(
            grpc.aio.insecure_channel(target, options=channel_options(target))
            if credentials is None
            else grpc.aio.secure_channel(target, credentials, options=channel_options(target)),
            api_key,
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

    def _stream(self, request: pb.GenerateRequest, *limits: float | None) -> AsyncGenerationStream:
        return AsyncGenerationStream(self._stub, request, *limits)


def _check(target: str, api_key: str | None) -> None:
    """Raises InvalidRequestError, before there is a channel to close."""
    checked_text("target", target)
    if api_key is not None:
        checked_key(api_key)


def _seconds(timeout: float | None) -> float | None:
    return checked_seconds("timeout", timeout)


@contextmanager
def _plain_errors() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise service_error(error) from None
