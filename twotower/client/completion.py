"""One completion over as many streams as it takes: all that the two clients share, without I/O.

A stream that breaks is gone on with by a request that has the same prompt, parameters and seed,
and what has been received as `generated_token_ids`. The service then sends what comes after it:
tokens and text go on without a seam.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import grpc

from twotower.client.messages import (
    ServiceError,
    service_error,
    text_block,
    usage_of,
)
from twotower.protos.backoff import backoff_s
from twotower.protos.refusals import is_lost, is_own_internal
from twotower.protos.v1 import generation_pb2 as pb
from twotower.towers.request.results import TextBlock, Usage

MAX_BROKEN = 4
# A server that is gone before it has said that it has begun may have gone because of the request.
# After the pause, a death that a proxy had not heard of yet is not counted as another one.
MAX_KILLED = 2
KILLED_PAUSE_S = 2.0
ADMISSION_TIMEOUT_S = 5.0
_BREAKS = (
    grpc.StatusCode.UNAVAILABLE,
    # A proxy or server that goes down, a connection that is reset: which code depends on the front.
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
)
_NOT_THERE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)


@dataclass(frozen=True)
class Limits:
    """Seconds for the whole completion, None = no limit; whether and how long it is resumed.

    `resume_timeout` counts from a break to the next block.
    """

    timeout: float | None = None
    resume: bool = True
    resume_timeout: float = 60.0


class Completion:
    """What has been received of one completion, and what to ask for next.

    `request_id`, `seed` and `prompt_tokens` are there once the service has admitted the request
    (with the first block at the latest), `finish_reason`, `matched_stop` (the stop string that
    ended the output, or None) and `usage` after the last block. `token_ids` are those received so
    far: with the seed, what a resume needs. `log_probs` are theirs, if they were asked for.
    `steps_per_block` and `confidence_threshold` are those that the blocks were made with if the
    request has declared a floor, else None. `resumes` is the number of streams that were gone on
    with.
    """

    def __init__(self, request: pb.GenerateRequest, limits: Limits) -> None:
        self.request_id: str | None = None
        self.seed: int | None = None
        self.prompt_tokens: int | None = None
        self.token_ids: list[int] = []
        self.log_probs: list[float] = []
        self.finish_reason: str | None = None
        self.matched_stop: str | None = None
        self.usage: Usage | None = None
        self.steps_per_block: int | None = None
        self.confidence_threshold: float | None = None
        self.resumes = 0
        self._request = request
        self._limits = limits
        self._began = time.monotonic()
        self._blocks = 0
        self._spent: Usage | None = None
        self._spent_before: Usage | None = None
        self._admitted = False
        self._broken_since: float | None = None
        self._tries = 0
        self._broken = 0
        self._killed = 0

    def _next_request(self) -> pb.GenerateRequest:
        """What to send now: the request as given, or what resumes it."""
        request = pb.GenerateRequest()
        request.CopyFrom(self._request)
        if self.seed is not None and self.request_id is not None:
            request.request_id = self.request_id
            request.sampling_params.seed = self.seed
            request.generated_token_ids.extend(self.token_ids)
            self._keep_service(request.sampling_params)
        self._admitted = False
        return request

    def _keep_service(self, params: pb.SamplingParams) -> None:
        """Other steps than those of the first blocks would give other tokens."""
        if self.steps_per_block is None or self.confidence_threshold is None:
            return
        params.steps_per_block = self.steps_per_block
        params.confidence_threshold = self.confidence_threshold
        params.ClearField("min_steps_per_block")
        params.ClearField("min_confidence_threshold")

    def _time_left(self) -> float | None:
        """Seconds left for the next call."""
        if self._limits.timeout is None:
            return None
        return max(0.0, self._began + self._limits.timeout - time.monotonic())

    def _take(self, response: pb.GenerateResponse) -> TextBlock | None:
        """Takes a message in; returns the block that it brings. Raises ServiceError for a gap."""
        kind = response.WhichOneof("event")
        if kind == "started":
            self._admitted, self._killed = True, 0
            self.request_id = response.started.request_id
            self.seed = response.started.seed
            self.prompt_tokens = response.started.prompt_tokens
        if kind == "block":
            return self._take_block(response.block)
        if kind == "complete":
            complete = response.complete
            self.finish_reason = complete.finish_reason
            if complete.HasField("matched_stop"):
                self.matched_stop = complete.matched_stop
            self.usage = usage_of(complete.usage).after(self._spent_before)
        return None

    def _take_block(self, block: pb.Block) -> TextBlock | None:
        expected = len(self._request.generated_token_ids) + len(self.token_ids)
        expected += self.prompt_tokens or 0
        if block.start < expected:
            return None
        if block.start > expected:
            text = f"a block is missing: got one at {block.start}, expected {expected}"
            raise ServiceError(grpc.StatusCode.UNAVAILABLE, text)
        self.token_ids.extend(block.token_ids)
        self.log_probs.extend(block.log_probs)
        if block.HasField("steps_per_block"):
            self.steps_per_block = block.steps_per_block
            self.confidence_threshold = block.confidence_threshold
        self._spent = usage_of(block.usage).after(self._spent_before)
        self._blocks += 1
        self._broken_since, self._tries, self._broken = None, 0, 0
        return text_block(block, self._blocks - 1)

    def _check_end(self) -> None:
        """Raises ServiceError if a stream that has ended well lacks its last message."""
        if self.finish_reason is None:
            raise ServiceError(grpc.StatusCode.UNKNOWN, "the stream ended without its last message")

    def _pause_after(self, error: Any) -> float:
        """Seconds to wait after a ServiceError or gRPC error, before the next stream.

        Raises it as a ServiceError if there is to be no next stream.
        """
        plain = error if isinstance(error, ServiceError) else service_error(error)
        now = time.monotonic()
        # One that is lost again and again may be the reason itself, so that is counted; a service
        # that is not there or has no room is only waited for.
        killed = is_lost(plain.details) and not self._admitted
        self._killed += killed
        self._broken += self._admitted or killed or plain.code not in _NOT_THERE
        resumed = self._limits.resume and self._is_break(plain) and self._broken < MAX_BROKEN
        resumed = resumed and self._killed < MAX_KILLED
        self._broken_since = self._broken_since or now
        self._tries += 1
        seconds = max(backoff_s(self._tries), plain.retry_after_s or 0.0)
        seconds = max(seconds, KILLED_PAUSE_S) if killed else seconds
        if now + seconds > self._broken_since + self._resume_timeout():
            resumed = False
        left = self._time_left()
        if not resumed or (left is not None and seconds >= left):
            raise plain from None
        self.resumes += 1
        self._spent_before = self._spent
        return seconds

    def _resume_timeout(self) -> float:
        if self.seed is not None:
            return self._limits.resume_timeout
        # Nothing has been heard of the service yet: perhaps it is not there at all.
        return min(ADMISSION_TIMEOUT_S, self._limits.resume_timeout)

    def _is_break(self, error: ServiceError) -> bool:
        if error.code == grpc.StatusCode.RESOURCE_EXHAUSTED:
            # Refused at first is refused; what has been admitted once waits for its place.
            return self._tries > 0
        if error.code == grpc.StatusCode.INTERNAL and is_own_internal(error.details):
            return False
        return error.code in _BREAKS
