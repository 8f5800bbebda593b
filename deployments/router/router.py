"""The router: admits requests, sends them to a pair, commits and streams their blocks.

Method names in capitals are RPC names: Serve finds them by name. The class is plain; `app.py`
makes a deployment of it.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from starlette.responses import PlainTextResponse

import twotower
from twotower.deployments.config import ServiceConfig
from twotower.deployments.pair.tower_pair import Job
from twotower.deployments.router import codec
from twotower.deployments.router.encoding import TextReader
from twotower.deployments.router.status import refuse
from twotower.deployments.routing.attempts import Attempts, PairClient, attempt_id
from twotower.deployments.routing.policy import Room
from twotower.deployments.routing.retry import RetryPolicy
from twotower.protos.incoming import MESSAGE_VARIABLE, message_limit
from twotower.protos.refusals import RequestRefusedError, marked
from twotower.protos.v1 import generation_pb2 as pb
from twotower.towers.checkpoint.weights import resolve_checkpoint
from twotower.towers.config.model_config import TwoTowerConfig
from twotower.towers.decoding.commit_log import CommitLog
from twotower.towers.decoding.output import begin_output, commit_blocks
from twotower.towers.decoding.output_text import OutputText
from twotower.towers.decoding.services import ProvisionalBlock
from twotower.towers.errors import InvalidRequestError
from twotower.towers.request.modes import served_modes
from twotower.towers.request.params import GenerationParams
from twotower.towers.request.token_ids import check_ids
from twotower.towers.text.text_limit import longest_token_bytes
from twotower.towers.text.tokenizer import load_tokenizer

logger = logging.getLogger("ray.serve")

SERVICE_NAME = "twotower.v1.Generation"
READY_TIMEOUT_S = 5.0
WATCH_PERIOD_S = 1.0
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Router:
    """Serves `twotower.v1.Generation` and `grpc.health.v1.Health` over a deployment of pairs."""

    def __init__(self, config: ServiceConfig, pairs: Any) -> None:
        folder = resolve_checkpoint(config.model)
        self._model = TwoTowerConfig.from_file(folder / "config.json")
        self._tokenizer = load_tokenizer(folder)
        self._pairs = PairClient(pairs)
        retry = RetryPolicy(config.resume_timeout_s, config.max_attempts)
        room = Room.of(config.max_num_seqs, config.num_routers)
        self._attempts = Attempts(self._pairs, retry, room)
        self._max_message = config.message_bytes()
        _compare_limits(self._max_message)
        self._modes = served_modes(with_denoiser=config.placement != "ar_only")
        self._from_zero = config.autoscaling is not None and config.autoscaling.min_pairs == 0
        self._max_context = min(config.max_context, self._model.max_position_embeddings)
        self._reader = TextReader(self._tokenizer, longest_token_bytes(folder), self._max_context)
        self._info = codec.model_info(
            self._model,
            name=config.model_name or folder.name,
            version=twotower.__version__,
            max_context=self._max_context,
            modes=self._modes,
            has_tokenizer=self._tokenizer is not None,
            dtype=config.dtype,
        )

    async def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, grpc_context: Any
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Streams a completion."""
        request_id = _log_name(request.request_id)
        try:
            async with aclosing(self._completion(request)) as events:
                async for event in events:
                    yield event
        except Exception as error:
            refuse(grpc_context, error, request_id)

    async def Score(  # noqa: N802
        self, request: pb.ScoreRequest, grpc_context: Any
    ) -> pb.ScoreResponse:
        """Scores a text."""
        try:
            return await self._scored(request)
        except Exception as error:
            refuse(grpc_context, error, _log_name(request.request_id))

    async def GetModelInfo(  # noqa: N802
        self, _request: pb.GetModelInfoRequest
    ) -> pb.ModelInfo:
        """Model, limits and modes of the service."""
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
        self, request: health_pb2.HealthCheckRequest
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Streams the health, now and whenever it changes."""
        last: int | None = None
        while True:
            status = await self._health(request.service)
            if status != last:
                yield health_pb2.HealthCheckResponse(status=status)
                last = status
            await asyncio.sleep(WATCH_PERIOD_S)

    async def __call__(self, _request: Any) -> PlainTextResponse:
        """Serve's HTTP side reaches every ingress; this one speaks gRPC only."""
        return PlainTextResponse("this service speaks gRPC\n", status_code=404)

    async def _completion(
        self, request: pb.GenerateRequest
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        request_id = codec.request_id_of(request.request_id)
        job, text, log = await self._admit(request)
        log_probs = request.sampling_params.logprobs
        yield codec.started_event(job, request_id)
        blocks = commit_blocks(self._attempts.blocks(job, log), text, log)
        async with aclosing(blocks):
            async for block, shown in blocks:
                if isinstance(block, ProvisionalBlock):
                    continue
                yield codec.block_event(log, block, shown, job.params, log_probs=log_probs)
        yield codec.complete_event(log, text.matched_stop)

    async def _admit(self, request: pb.GenerateRequest) -> tuple[Job, OutputText, CommitLog]:
        """The request as a job within the model's limits, with the text and log of its output.

        Sizes are checked before anything else. Raises InvalidRequestError, and QueueFullError if
        too many texts wait to be encoded.
        """
        codec.check_size(request, self._max_message)
        self._reader.check_count("generated_token_ids", len(request.generated_token_ids))
        params = codec.params_of(request.sampling_params, self._model.eos_token_id)
        if params.mode not in self._modes:
            raise InvalidRequestError("mode", params.mode, f"{', '.join(self._modes)} alone")
        prompt = await codec.token_ids_of(request, "prompt", self._reader)
        generated = tuple(request.generated_token_ids)
        check = partial(params.check_row, prompt, self._model.vocab_size, self._max_context)
        check([])
        check_ids("generated_token_ids", generated, self._model.vocab_size)
        begin = partial(begin_output, self._tokenizer, params, len(prompt), generated)
        text, log = await self._reader.run(_work_of(params, generated), begin)
        if log.finish_reason is None:
            check(list(generated))
        return Job(attempt_id(), tuple(prompt), generated, params), text, log

    async def _scored(self, request: pb.ScoreRequest) -> pb.ScoreResponse:
        codec.request_id_of(request.request_id)
        codec.check_size(request, self._max_message)
        token_ids = await codec.token_ids_of(request, "input", self._reader)
        check_ids("input", token_ids, self._model.vocab_size)
        if not token_ids:
            raise InvalidRequestError("input", [], "at least 1 token")
        scores = await self._attempts.score(token_ids)
        return codec.score_response(token_ids, scores.log_probs)

    async def _health(self, service: str) -> int:
        if not service:
            return int(_SERVING)
        if service != SERVICE_NAME:
            return int(_UNKNOWN)
        if self._from_zero:
            # Requests may wait for the first pair; a ping would start it.
            return int(_SERVING)
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                await self._pairs.ping()
        except Exception as error:
            logger.info("not ready: %s", type(error).__name__)
            return int(_NOT_SERVING)
        return int(_SERVING)


def _compare_limits(needed: int) -> None:
    """Logs a warning if the proxies take longer messages than the router: those are received in
    full before they are refused."""
    taken = message_limit(os.environ)
    if taken != needed:
        logger.warning(
            "proxies take messages of %d bytes, requests have up to %d: set %s=%d where Ray starts",
            *(taken, needed, MESSAGE_VARIABLE, needed),
        )


def _work_of(params: GenerationParams, generated: tuple[int, ...]) -> int:
    """Bytes of a prompt that take as long to encode as the text of a resumed output takes to
    decode; with stop strings it is decoded token by token."""
    return len(generated) * (32 if params.stop else 4)


def _log_name(given: str) -> str:
    """A name for the log, made before the request is known to be valid."""
    try:
        return codec.request_id_of(given)
    except InvalidRequestError:
        return "(invalid request_id)"
