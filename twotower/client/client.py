"""Clients of the service over gRPC, a blocking one and one for asyncio, without torch and Ray."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Generic, NamedTuple, TypeVar

import grpc
import grpc.aio

from twotower.client.channels import channel_options
from twotower.client.choices import AsyncChoicesStream, ChoicesStream
from twotower.client.keys import KeyedChannel, checked_key
from twotower.client.messages import (
    Bias,
    ModelInfo,
    Score,
    detokenize_request,
    generate_request,
    model_info_of,
    score_of,
    score_request,
    service_error,
    tokenize_request,
)
from twotower.client.streams import AsyncGenerationStream, GenerationStream
from twotower.client.wire_values import checked_scalars, checked_seconds, checked_text
from twotower.protos.v1 import generation_pb2 as pb
from twotower.protos.v1 import generation_pb2_grpc
from twotower.towers.request.number_checks import check_whole
from twotower.towers.request.params import MAX_CHOICES
from twotower.towers.request.token_ids import Prompt, TokenIds, plain_number

S = TypeVar("S")


class _Asked(NamedTuple):
    """A completion to start: the request, and the limits of Completion."""

    request: pb.GenerateRequest
    timeout: float | None
    resume_timeout: float | None


class _Calls(ABC, Generic[S]):
    """Starts completions."""

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
        top_logprobs: int | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: Bias | None = None,
        provisional: bool | None = None,
        quality: str | None = None,
        draft_source: str | None = None,
        acceptance: str | None = None,
        mix_ratio: float | None = None,
        commit_rule: str | None = None,
        first_token: str | None = None,
        generated_token_ids: TokenIds = (),
        request_id: str = "",
        timeout: float | None = None,
        resume: bool = True,
        resume_timeout: float = 60.0,
    ) -> S:
        """Starts a completion of a text or of token ids; None leaves the service's default.

        Ids are a list, an array or a tensor, [n] or [1, n].
        `stop` is a list of strings, `logprobs` asks for log-probabilities and `top_logprobs` for
        that many of the most probable tokens at each position; `logit_bias` is a mapping of ids, or
        pairs. With `provisional` the stream also gives each ProvisionalBlock before its block, and
        after a loss those of its block again. `generated_token_ids` goes on with what an earlier
        program has received; `timeout` is in seconds, for the whole.
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
            "top_logprobs": top_logprobs,
            "presence_penalty": presence_penalty,
            "frequency_penalty": frequency_penalty,
            "provisional": provisional,
            "quality": quality,
            "draft_source": draft_source,
            "acceptance": acceptance,
            "mix_ratio": mix_ratio,
            "commit_rule": commit_rule,
            "first_token": first_token,
        }
        request = generate_request(
            prompt, stop, generated_token_ids, request_id, scalars, logit_bias
        )
        timeout = checked_seconds("timeout", timeout)
        waits = checked_seconds("resume_timeout", resume_timeout)
        waits = math.inf if waits is None else waits
        return self._begin(_Asked(request, timeout, waits if resume else None))

    @abstractmethod
    def _begin(self, asked: _Asked) -> S:
        """Starts a stream."""


class _Reader(_Calls[_Asked]):
    """Reads arguments of `generate` and starts nothing."""

    def _begin(self, asked: _Asked) -> _Asked:
        return asked


class _Stub:
    """The stub of a channel."""

    def __init__(self, channel: Any, api_key: str | None) -> None:
        self._channel = channel if api_key is None else KeyedChannel(channel, api_key)
        self._stub: Any = generation_pb2_grpc.GenerationStub(self._channel)


def _choices(prompt: Prompt, n: int, parameters: dict[str, Any]) -> _Asked:
    """The request of several completions. Raises InvalidRequestError."""
    asked = _Reader().generate(prompt, **parameters)
    check_whole("n", plain_number(n), 1, MAX_CHOICES)
    asked.request.n = checked_scalars(pb.GenerateRequest.DESCRIPTOR, {"n": n})["n"]
    return asked


class Client(_Stub, _Calls[GenerationStream]):
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

    def generate_choices(self, prompt: Prompt, n: int, **parameters: Any) -> ChoicesStream:
        """Starts `n` completions (1 to 128) of a prompt that share a call; iterate over pairs of
        their number, from 0, and a block. `parameters` are arguments of `generate`, a `seed` that
        of number 0; `choices` of the stream has each completion."""
        return ChoicesStream(self._stub, *_choices(prompt, n, parameters))

    def score(self, text: Prompt, top_logprobs: int = 0, *, timeout: float | None = None) -> Score:
        """Log-probabilities of a text or of token ids ([n] or [1, n]), and `top_logprobs` of the
        most probable tokens at each position. Raises ServiceError, and InvalidRequestError for
        invalid ids."""
        request = score_request(text, top_logprobs)
        with _plain_errors():
            return score_of(self._stub.Score(request, timeout=_seconds(timeout)))

    def tokenize(self, text: str, *, timeout: float | None = None) -> list[int]:
        """The ids of a text, with the special tokens that the tokenizer puts around one. Raises
        ServiceError, also for a model without a tokenizer."""
        request = tokenize_request(text)
        with _plain_errors():
            return list(self._stub.Tokenize(request, timeout=_seconds(timeout)).token_ids)

    def detokenize(self, token_ids: TokenIds, *, timeout: float | None = None) -> str:
        """The text of ids, without special tokens. Raises ServiceError, and InvalidRequestError
        for invalid ids."""
        request = detokenize_request(token_ids)
        with _plain_errors():
            return str(self._stub.Detokenize(request, timeout=_seconds(timeout)).text)

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

    def _begin(self, asked: _Asked) -> GenerationStream:
        return GenerationStream(self._stub, *asked).begun()


class AsyncClient(_Stub, _Calls[AsyncGenerationStream]):
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

    def generate_choices(self, prompt: Prompt, n: int, **parameters: Any) -> AsyncChoicesStream:
        """As Client.generate_choices, for `async for`."""
        return AsyncChoicesStream(self._stub, *_choices(prompt, n, parameters))

    async def score(
        self, text: Prompt, top_logprobs: int = 0, *, timeout: float | None = None
    ) -> Score:
        """As Client.score."""
        request = score_request(text, top_logprobs)
        with _plain_errors():
            return score_of(await self._stub.Score(request, timeout=_seconds(timeout)))

    async def tokenize(self, text: str, *, timeout: float | None = None) -> list[int]:
        """As Client.tokenize."""
        request = tokenize_request(text)
        with _plain_errors():
            answer = await self._stub.Tokenize(request, timeout=_seconds(timeout))
            return list(answer.token_ids)

    async def detokenize(self, token_ids: TokenIds, *, timeout: float | None = None) -> str:
        """As Client.detokenize."""
        request = detokenize_request(token_ids)
        with _plain_errors():
            answer = await self._stub.Detokenize(request, timeout=_seconds(timeout))
            return str(answer.text)

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

    def _begin(self, asked: _Asked) -> AsyncGenerationStream:
        return AsyncGenerationStream(self._stub, *asked).begun()


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
