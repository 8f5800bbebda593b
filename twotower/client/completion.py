"""A completion that is resumed after breaks, without I/O: what both clients share.

After a break the next request has the same prompt, parameters and seed, and the tokens received so
far as `generated_token_ids`. The service sends what follows them: tokens and text continue without
a gap.
"""

from __future__ import annotations

import time
from typing import Any, cast

import grpc

from twotower.client.messages import (
    ServiceError,
    provisional_block,
    service_error,
    text_block,
    usage_of,
)
from twotower.protos.backoff import backoff_s
from twotower.protos.refusals import is_lost, is_own_internal
from twotower.protos.v1 import generation_pb2 as pb
from twotower.towers.request.results import TextBlock, TopLogProbs, Usage

MAX_BROKEN = 4
# A server that is lost before it has begun a request may have been lost because of it. The pause
# gives a proxy time to notice the loss, so that it is not counted twice.
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


class Completion:
    """State of a completion: the blocks received so far, and the request that resumes it.

    `request_id`, `seed` and `prompt_tokens` are there once the service has admitted the request
    (with the first block at the latest), `finish_reason`, `matched_stop` (the stop string that
    ended the output, or None) and `usage` after the last block. `token_ids` are those received so
    far, which with the seed resume it elsewhere. `log_probs` are theirs and
    `top_log_probs` the most probable tokens at their positions, if they were asked for.
    `steps_per_block` and `confidence_threshold` are those that the blocks were made with if the
    request has declared a floor, else None. `resumes` is the number of breaks so far.

    `timeout` limits the whole completion, `resume_timeout` the time from a break to the next block,
    in seconds; without a resume_timeout nothing is resumed.
    """

    def __init__(
        self, request: pb.GenerateRequest, timeout: float | None, resume_timeout: float | None
    ) -> None:
        self.request_id: str | None = None
        self.seed: int | None = None
        self.prompt_tokens: int | None = None
        self.token_ids: list[int] = []
        self.log_probs: list[float] = []
        self.top_log_probs: list[TopLogProbs] = []
        self.finish_reason: str | None = None
        self.matched_stop: str | None = None
        self.usage: Usage | None = None
        self.steps_per_block: int | None = None
        self.confidence_threshold: float | None = None
        self.resumes = 0
        self._request = request
        self._timeout = timeout
        self._resume_timeout = resume_timeout
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
        """The request to send now: as given, or resuming."""
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
        """Asks for the steps and threshold of the first blocks: others would give other tokens."""
        if self.steps_per_block is None or self.confidence_threshold is None:
            return
        params.steps_per_block = self.steps_per_block
        params.confidence_threshold = self.confidence_threshold
        params.ClearField("min_steps_per_block")
        params.ClearField("min_confidence_threshold")

    def _time_left(self) -> float | None:
        """Seconds left for the next call."""
        if self._timeout is None:
            return None
        return max(0.0, self._began + self._timeout - time.monotonic())

    def _take(self, response: pb.GenerateResponse) -> TextBlock | None:
        """Reads a message; returns its block, if that is new, or its draft. Raises ServiceError for
        a gap."""
        kind = response.WhichOneof("event")
        if kind == "started":
            self._admitted, self._killed = True, 0
            self.request_id = response.started.request_id
            self.seed = response.started.seed
            self.prompt_tokens = response.started.prompt_tokens
        if kind == "block":
            return self._take_block(response.block)
        if kind == "provisional":
            # Only a caller who asks for drafts has to know that there is another type.
            return cast("TextBlock", provisional_block(response.provisional))
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
        taken = text_block(block, self._blocks)
        self.top_log_probs.extend(taken.top_log_probs)
        self._blocks += 1
        self._broken_since, self._tries, self._broken = None, 0, 0
        return taken

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
        # A request that loses its server again and again may be the cause, so breaks are counted. A
        # service that is not there or has no room is waited for without counting.
        killed = is_lost(plain.details) and not self._admitted
        self._killed += killed
        self._broken += self._admitted or killed or plain.code not in _NOT_THERE
        resumed = self._is_break(plain) and self._broken < MAX_BROKEN
        resumed = resumed and self._killed < MAX_KILLED
        self._broken_since = self._broken_since or now
        self._tries += 1
        seconds = max(backoff_s(self._tries), plain.retry_after_s or 0.0)
        seconds = max(seconds, KILLED_PAUSE_S) if killed else seconds
        patience, left = self._patience(), self._time_left()
        if patience is None or now + seconds > self._broken_since + patience:
            resumed = False
        if not resumed or (left is not None and seconds >= left):
            raise plain from None
        self.resumes += 1
        self._spent_before = self._spent
        return seconds

    def _patience(self) -> float | None:
        """Seconds from a break to the next block; None if nothing is resumed."""
        if self.seed is not None or self._resume_timeout is None:
            return self._resume_timeout
        # The service has not answered yet: perhaps it is not there at all.
        return min(ADMISSION_TIMEOUT_S, self._resume_timeout)

    def _is_break(self, error: ServiceError) -> bool:
        if error.code == grpc.StatusCode.RESOURCE_EXHAUSTED:
            # Refused at first is refused; what has been admitted once waits for its place.
            return self._tries > 0
        if error.code == grpc.StatusCode.INTERNAL and is_own_internal(error.details):
            return False
        return error.code in _BREAKS
