"""The gRPC front of the router, and the deployment that all fronts share.

Method names in capitals are RPC names: Serve finds them by name. The class is plain; `app.py`
makes a deployment of it. What a request is and what becomes of it stands in `completions`.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import grpc
from fastapi import FastAPI
from grpc_health.v1 import health_pb2

from twotower.deployments.access.limits import Admission
from twotower.deployments.completions.completions import Completions, merged
from twotower.deployments.completions.requests import request_id_of
from twotower.deployments.completions.status import refuse
from twotower.deployments.config import ServiceConfig
from twotower.deployments.http.app import build_http_app
from twotower.deployments.router import codec
from twotower.deployments.router.calls import (
    Refusing,
    caller_of,
    log_name,
    request_name,
    trace_parent,
)
from twotower.deployments.router.inference import InferenceMethods
from twotower.protos.incoming import (
    MESSAGE_VARIABLE,
    REQUEST_VARIABLE,
    answer_limit,
    longest_answer,
    message_limit,
)
from twotower.protos.refusals import RequestRefusedError, marked
from twotower.protos.v1 import generation_pb2 as pb
from twotower.towers.decoding.services import ProvisionalBlock
from twotower.towers.errors import CapacityError

logger = logging.getLogger("ray.serve")

SERVICE_NAME = "twotower.v1.Generation"
WATCH_PERIOD_S = 1.0
# Streams of health of one router, each of which asks a pair every WATCH_PERIOD_S.
MAX_WATCHES = 64
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Router(InferenceMethods):
    """Serves `twotower.v1.Generation`, KServe's protocol and `grpc.health.v1.Health` over a
    deployment of pairs, and the HTTP front beside them."""

    def __init__(self, config: ServiceConfig, pairs: Any) -> None:
        self._config = config
        self._access = config.access()
        self._completions = Completions(config, pairs)
        model = self._completions.model
        _compare_limits(self._completions.max_message, longest_answer(model.max_context))
        self._info = codec.model_info(model)
        self._watches = 0

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The HTTP front; Serve asks for it after the constructor."""
        return build_http_app(self._completions, self._config, self._access)

    async def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, grpc_context: Any
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Streams the completions of a prompt."""
        # In the answer, too, if it is drawn here.
        name = request_name(grpc_context, request.request_id)
        with (
            Refusing(grpc_context, name),
            caller_of(self._access, grpc_context).limits.admit() as admission,
        ):
            trace = trace_parent(grpc_context)
            async with aclosing(self._events(request, name, trace, admission)) as events:
                async for event in events:
                    yield event

    async def Score(  # noqa: N802
        self, request: pb.ScoreRequest, grpc_context: Any
    ) -> pb.ScoreResponse:
        """Scores a text."""
        with (
            Refusing(grpc_context, request.request_id),
            caller_of(self._access, grpc_context).limits.admit() as admission,
        ):
            return await self._scored(request, admission)

    async def Tokenize(  # noqa: N802
        self, request: pb.TokenizeRequest, grpc_context: Any
    ) -> pb.TokenizeResponse:
        """The ids of a text."""
        with Refusing(grpc_context):
            caller_of(self._access, grpc_context)
            ids = await self._completions.token_ids("text", request.text)
            return pb.TokenizeResponse(token_ids=ids)

    async def Detokenize(  # noqa: N802
        self, request: pb.DetokenizeRequest, grpc_context: Any
    ) -> pb.DetokenizeResponse:
        """The text of ids."""
        with Refusing(grpc_context):
            caller_of(self._access, grpc_context)
            ids = list(request.token_ids)
            return pb.DetokenizeResponse(text=await self._completions.decode("token_ids", ids))

    async def GetModelInfo(  # noqa: N802
        self, _request: pb.GetModelInfoRequest, grpc_context: Any
    ) -> pb.ModelInfo:
        """Model, limits and modes of the service."""
        with Refusing(grpc_context):
            caller_of(self._access, grpc_context)
            return self._info

    async def Check(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, grpc_context: Any
    ) -> health_pb2.HealthCheckResponse:
        """Liveness for "", readiness for the Generation service."""
        status = await self._health(request.service)
        if status == _UNKNOWN:
            grpc_context.set_code(grpc.StatusCode.NOT_FOUND)
            grpc_context.set_details(marked(f"service: expected '' or {SERVICE_NAME!r}"))
            raise RequestRefusedError("unknown service") from None
        return health_pb2.HealthCheckResponse(status=status)

    async def List(  # noqa: N802
        self, _request: health_pb2.HealthListRequest
    ) -> health_pb2.HealthListResponse:
        """The health of both names that Check knows."""
        statuses = {
            name: health_pb2.HealthCheckResponse(status=await self._health(name))
            for name in ("", SERVICE_NAME)
        }
        return health_pb2.HealthListResponse(statuses=statuses)

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, grpc_context: Any = None
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Streams the health, now and whenever it changes."""
        if self._watches >= MAX_WATCHES:
            # They need no key, and never end: others would have no place left.
            busy = CapacityError(f"{self._watches} watch already, expected fewer; use Check")
            refuse(grpc_context, busy, log_name(grpc_context))
        self._watches += 1
        try:
            last: int | None = None
            while True:
                status = await self._health(request.service)
                if status != last:
                    yield health_pb2.HealthCheckResponse(status=status)
                    last = status
                await asyncio.sleep(WATCH_PERIOD_S)
        finally:
            self._watches -= 1

    async def _events(
        self, request: pb.GenerateRequest, name: str, trace: str | None, admission: Admission
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        eos, longest = self._completions.model.eos_token_id, self._completions.max_message
        asked = codec.completion_request(request, eos, longest, name)
        asked = replace(asked, caller=admission.name, traceparent=trace)
        completions = await self._completions.admit(asked, admission.charge)
        log_probs = request.sampling_params.logprobs
        for completion in completions:
            yield codec.started_event(completion, asked.request_id)
            if completion.log.finish_reason is not None:
                # Complete already, as its client could not know.
                yield codec.complete_event(completion)
        async with aclosing(merged(completions)) as items:
            async for completion, (block, text) in items:
                if isinstance(block, ProvisionalBlock):
                    yield codec.provisional_event(completion, block)
                    continue
                yield codec.block_event(completion, block, text, log_probs=log_probs)
                if completion.log.finish_reason is not None:
                    yield codec.complete_event(completion)
        if any(completion.log.finish_reason is None for completion in completions):
            raise RuntimeError("the blocks ended without a finish reason")

    async def _scored(self, request: pb.ScoreRequest, admission: Admission) -> pb.ScoreResponse:
        request_id_of(request.request_id)
        codec.check_size(request, self._completions.max_message)
        given = codec.input_of(request, "input")
        token_ids = await self._completions.token_ids("input", given)
        scores = await self._completions.score(
            "input", token_ids, request.top_logprobs, admission.charge
        )
        return codec.score_response(token_ids, scores)

    async def _health(self, service: str) -> int:
        if not service:
            return int(_SERVING)
        if service != SERVICE_NAME:
            return int(_UNKNOWN)
        return int(_SERVING if await self._completions.is_ready() else _NOT_SERVING)


def _compare_limits(requests: int, answers: int) -> None:
    """Logs a warning if the proxies take longer messages than the router, which are received in
    full before they are refused, or send none that are as long as its answers."""
    taken, sent = message_limit(os.environ), answer_limit(os.environ)
    if taken != requests:
        logger.warning(
            "proxies take messages of %d bytes, requests have up to %d: set %s=%d where Ray starts",
            *(taken, requests, REQUEST_VARIABLE, requests),
        )
    if sent < answers:
        logger.warning(
            "proxies send messages of %d bytes, answers have up to %d: set %s=%d where Ray starts",
            *(sent, answers, MESSAGE_VARIABLE, answers),
        )
