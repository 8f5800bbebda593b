"""KServe's methods of the router: inference.GRPCInferenceService.

Serve finds methods by their names alone, so that Router has them as its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from twotower.deployments.access.access import Access, Caller
from twotower.deployments.access.limits import Admission
from twotower.deployments.completions.completions import Completions
from twotower.deployments.completions.requests import MAX_CHOICES, request_id_of
from twotower.deployments.completions.status import error_answer
from twotower.deployments.router import codec, kserve
from twotower.deployments.router.calls import Refusing, caller_of, request_name, trace_parent
from twotower.protos.incoming import Refusal
from twotower.protos.kserve import inference_pb2 as pb
from twotower.towers.decoding.services import Block
from twotower.towers.errors import InvalidRequestError

logger = logging.getLogger("ray.serve")

# Requests of a stream that run at once; more are left unread.
MAX_AT_ONCE = MAX_CHOICES
Answers = AsyncGenerator[pb.ModelStreamInferResponse, None]


class InferenceMethods:
    """Serves KServe's protocol with what Router has."""

    _access: Access
    _completions: Completions

    async def ServerLive(  # noqa: N802
        self, _request: pb.ServerLiveRequest
    ) -> pb.ServerLiveResponse:
        """True."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(  # noqa: N802
        self, _request: pb.ServerReadyRequest
    ) -> pb.ServerReadyResponse:
        """Whether a request would be served now."""
        return pb.ServerReadyResponse(ready=await self._completions.is_ready())

    async def ModelReady(  # noqa: N802
        self, request: pb.ModelReadyRequest, grpc_context: Any
    ) -> pb.ModelReadyResponse:
        """Whether a request to a model would be served now."""
        with Refusing(grpc_context):
            kserve.check_model(self._completions.model, request.name, request.version)
            return pb.ModelReadyResponse(ready=await self._completions.is_ready())

    async def ServerMetadata(  # noqa: N802
        self, _request: pb.ServerMetadataRequest, grpc_context: Any
    ) -> pb.ServerMetadataResponse:
        """Name and version of what serves."""
        with Refusing(grpc_context):
            caller_of(self._access, grpc_context)
            return kserve.server_metadata(self._completions.model)

    async def ModelMetadata(  # noqa: N802
        self, request: pb.ModelMetadataRequest, grpc_context: Any
    ) -> pb.ModelMetadataResponse:
        """The model's tensors."""
        with Refusing(grpc_context):
            caller_of(self._access, grpc_context)
            kserve.check_model(self._completions.model, request.name, request.version)
            return kserve.model_metadata(self._completions.model)

    async def ModelInfer(  # noqa: N802
        self, request: pb.ModelInferRequest, grpc_context: Any
    ) -> pb.ModelInferResponse:
        """Completes a prompt."""
        with Refusing(grpc_context, request.id):
            name = request_name(grpc_context, request.id)
            with caller_of(self._access, grpc_context).limits.admit() as admission:
                trace = trace_parent(grpc_context)
                inferred = self._inferred(request, name, admission, trace=trace)
                async with aclosing(inferred) as answers:
                    async for answer in answers:
                        return answer
            raise RuntimeError("a request without an answer")

    async def ModelStreamInfer(  # noqa: N802
        self, requests: AsyncIterator[pb.ModelInferRequest | Refusal], grpc_context: Any
    ) -> Answers:
        """Completes prompts side by side."""
        with Refusing(grpc_context):
            caller = caller_of(self._access, grpc_context)
            answered = side_by_side(requests, lambda request: self._told(request, caller))
            async with aclosing(answered) as answers:
                async for answer in answers:
                    yield answer

    async def _told(self, request: pb.ModelInferRequest | Refusal, caller: Caller) -> Answers:
        """The answers to a request of a stream, its error among them."""
        if isinstance(request, Refusal):
            yield kserve.failure(request.details, "")
            return
        try:
            with caller.limits.admit() as admission:
                inferred = self._inferred(request, "", admission, may_stream=True)
                async with aclosing(inferred) as answers:
                    async for answer in answers:
                        yield pb.ModelStreamInferResponse(infer_response=answer)
        except Exception as error:
            yield _failed(error, request.id)

    async def _inferred(
        self,
        request: pb.ModelInferRequest,
        name: str,
        admission: Admission,
        *,
        trace: str | None = None,
        may_stream: bool = False,
    ) -> AsyncGenerator[pb.ModelInferResponse, None]:
        """The answers to a request: one for each block if it streams, otherwise one."""
        model = self._completions.model
        codec.check_size(request, self._completions.max_message)
        inference = kserve.inference_of(request, name, model, may_stream=may_stream)
        asked = replace(inference.asked, caller=admission.name, traceparent=trace)
        [completion] = await self._completions.admit(asked, admission.charge)
        texts: list[str] = []
        token_ids: list[int] = []
        async with aclosing(completion.blocks()) as blocks:
            async for block, text in blocks:
                if not isinstance(block, Block):
                    continue
                texts.append(text)
                token_ids.extend(block.token_ids)
                if inference.streams or completion.log.finish_reason is not None:
                    whole = "".join(texts)
                    yield kserve.answer_of(completion, inference, model, whole, token_ids)
                    texts, token_ids = [], []
        if completion.log.finish_reason is None:
            raise RuntimeError("the blocks ended without a finish reason")


async def side_by_side(
    requests: AsyncIterator[Any], answers_of: Callable[[Any], Answers], limit: int = MAX_AT_ONCE
) -> Answers:
    """The answers to requests, as they come; the requests after `limit` that are not answered yet
    are left unread, and a slow reader of the answers holds up what makes them.

    Whatever ends the iteration ends all. Raises what reading the requests raises.
    """
    queue: asyncio.Queue[Any] = asyncio.Queue(limit)
    reader = asyncio.ensure_future(_read(requests, answers_of, limit, queue))
    try:
        while (item := await queue.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)


async def _read(
    requests: AsyncIterator[Any],
    answers_of: Callable[[Any], Answers],
    limit: int,
    queue: asyncio.Queue[Any],
) -> None:
    """Puts all answers, then None, or the error that has ended the requests."""
    places = asyncio.Semaphore(limit)

    async def pour(request: Any) -> None:
        async with aclosing(answers_of(request)) as answers:
            async for answer in answers:
                await queue.put(answer)

    end: Exception | None = None
    try:
        async with asyncio.TaskGroup() as group:
            async for request in requests:
                await places.acquire()
                task = group.create_task(pour(request))
                task.add_done_callback(lambda _: places.release())
    except ExceptionGroup as errors:
        end = errors.exceptions[0]
    await queue.put(end)


def _failed(error: Exception, given: str) -> pb.ModelStreamInferResponse:
    """The message of an error, as the status of another call would say it."""
    try:
        name = request_id_of(given)
    except InvalidRequestError:
        name = "(invalid id)"
    _, text = error_answer(error, name)
    return kserve.failure(text, given)
