"""A service as a Backend: many calls in flight, whose rows share the passes of its pairs."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, TypeVar

from twotower.call_loop import CallLoop
from twotower.client import AsyncClient, Client, ServiceError
from twotower.evaluation.backend import Asked, Scored, Written
from twotower.protos.backoff import backoff_s
from twotower.towers.errors import InvalidRequestError
from twotower.towers.request.params import SAMPLING_PARAMETERS, GenerationParams

T = TypeVar("T")
A = TypeVar("A")
PATIENCE_S = 600.0
# The drafts of a stream are of no use here, and log-probabilities come from `score`.
_NOT_ASKED = ("provisional", "top_logprobs")
_DEFAULTS = {field.name: field.default for field in fields(GenerationParams)}


class OverGrpc:
    """The service at `target` (host:port), `calls` calls in flight. Raises ServiceError, also if
    it does not answer; InvalidRequestError for a model without a tokenizer or an EOS."""

    def __init__(self, target: str, *, api_key: str | None = None, calls: int = 16) -> None:
        self._target = target
        self._api_key = api_key
        self._places = calls
        self._calls = CallLoop()
        self._client = Client(target, api_key=api_key)
        self._known: dict[str, list[int]] = {}
        info = self._client.model_info()
        if not info.has_tokenizer:
            raise InvalidRequestError("target", target, "a service whose model has a tokenizer")
        self.name = info.name
        self.max_context = info.max_context
        self.eos_token_id = info.eos_token_id

    def encode(self, text: str) -> list[int]:
        """As Backend.encode. Texts are remembered: the choices of a question share its context."""
        if text not in self._known:
            self._known[text] = self._client.tokenize(text)
        return list(self._known[text])

    def decode(self, token_ids: Sequence[int]) -> str:
        """As Backend.decode."""
        return self._client.detokenize(list(token_ids))

    def write(self, asked: Sequence[Asked]) -> list[Written]:
        """As Backend.write."""

        async def one(client: AsyncClient, each: Asked) -> Written:
            stream = client.generate(list(each.prompt), **_arguments(each.params))
            text = "".join([block.text async for block in stream])
            assert stream.usage is not None, "a stream that ended well has its usage"
            usage = stream.usage
            return Written(text, usage.completion_tokens, usage.nfe, usage.context_passes)

        return self._calls.run(self._all(one, asked))

    def score(self, rows: Sequence[Sequence[int]]) -> list[Scored]:
        """As Backend.score."""

        async def one(client: AsyncClient, row: Sequence[int]) -> Scored:
            score = await client.score(list(row), top_logprobs=1)
            return Scored(score.log_probs, [top[0][0] for top in score.top_log_probs])

        return self._calls.run(self._all(one, rows))

    def close(self) -> None:
        """As Backend.close."""
        self._client.close()

    async def _all(
        self, ask: Callable[[AsyncClient, A], Awaitable[T]], given: Sequence[A]
    ) -> list[T]:
        """The answers to all calls, in order; the first error ends the others."""
        places = asyncio.Semaphore(self._places)

        async def placed(client: AsyncClient, each: A) -> T:
            async with places:
                return await patiently(partial(ask, client, each))

        async with AsyncClient(self._target, api_key=self._api_key) as client:
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(placed(client, each)) for each in given]
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None
            return [task.result() for task in tasks]


async def patiently(call: Callable[[], Awaitable[T]], patience_s: float = PATIENCE_S) -> T:
    """The result of a call that is made again while the service says when to come back, as it does
    where others fill its queue, for up to `patience_s` seconds. Raises ServiceError."""
    given_up = time.monotonic() + patience_s
    for tries in itertools.count(1):
        try:
            return await call()
        except ServiceError as error:
            if error.retry_after_s is None or time.monotonic() > given_up:
                raise
            await asyncio.sleep(max(error.retry_after_s, backoff_s(tries)))
    raise AssertionError("counting has no end")


def _arguments(params: GenerationParams) -> dict[str, Any]:
    """Arguments of the client for parameters; those of mode, length and seed always, of the others
    what is not the default."""
    given = {name: getattr(params, name) for name in SAMPLING_PARAMETERS if name not in _NOT_ASKED}
    always = ("mode", "max_tokens", "seed")
    return {
        name: value for name, value in given.items() if name in always or value != _DEFAULTS[name]
    }
