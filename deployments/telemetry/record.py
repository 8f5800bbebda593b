"""What is kept of each completion: its metrics, its trace and its line in the log."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from twotower.deployments.telemetry.logs import REQUEST_ID, log_completion
from twotower.deployments.telemetry.router_metrics import CompletionMetrics, RouterMetrics
from twotower.deployments.telemetry.spans import Trace
from twotower.towers.decoding.commit_log import CommitLog
from twotower.towers.decoding.services import Block, BlockTiming

# A gRPC status of an error, by name.
CodeOf = Callable[[BaseException], str]
_STOPPED = (GeneratorExit, asyncio.CancelledError)


class TraceSink(Protocol):
    """Takes completions that have ended, for their traces."""

    def ended(self, completion: Trace) -> None:
        """Takes a completion."""


@dataclass(frozen=True)
class Origin:
    """Where a completion comes from: its request's name, the name of its caller's key, the W3C
    trace context, and the monotonic time at which the request came."""

    request_id: str
    caller: str
    traceparent: str | None
    arrived: float


class Recorder:
    """Records the completions of a router."""

    def __init__(
        self, metrics: RouterMetrics, code_of: CodeOf, traces: TraceSink | None = None
    ) -> None:
        self.metrics = metrics
        self.code_of = code_of
        self.traces = traces

    def completion(self, origin: Origin, mode: str, log: CommitLog) -> CompletionRecord:
        """The record of a completion that begins when the record is entered."""
        return CompletionRecord(self, origin, mode, log)


class CompletionRecord:
    """A completion while it runs: a context manager around its blocks, which ends with them."""

    def __init__(self, recorder: Recorder, origin: Origin, mode: str, log: CommitLog) -> None:
        self._recorder = recorder
        self._origin = origin
        self._mode = mode
        self._log = log
        self._pair = ""
        self._metrics: CompletionMetrics
        self._began = 0.0
        self._blocks: list[tuple[BlockTiming, dict[str, int]]] = []

    def __enter__(self) -> CompletionRecord:
        origin = self._origin
        REQUEST_ID.set(origin.request_id)
        # By one look at both clocks: spans are in wall time, and the request came a while ago.
        self._began = time.time() - (time.monotonic() - origin.arrived)
        self._metrics = CompletionMetrics(self._recorder.metrics, self._mode, origin.arrived)
        return self

    def served_by(self, pair: str) -> None:
        """Notes the pair that serves from now on."""
        self._pair = pair
        self._metrics.moved_to(pair)

    def committed(self, block: Block) -> None:
        """Records a block that has just been committed to the log."""
        self._metrics.committed(block, self._log.prompt_tokens, self._log.cached_tokens)
        if self._recorder.traces is not None and block.timing is not None:
            costs = {"twotower.tokens": len(block.token_ids), "twotower.nfe": block.nfe}
            self._blocks.append((block.timing, costs))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        reason, code = self._outcome(error)
        seconds = self._metrics.ended(reason)
        log_completion(self._line(reason, code, seconds))
        if self._recorder.traces is not None:
            self._recorder.traces.ended(self._trace(reason, code, seconds))

    def _line(self, reason: str, code: str, seconds: float) -> dict[str, object]:
        usage, first_s = self._log.usage, self._metrics.first_s
        return {
            "request_id": self._origin.request_id,
            "key": self._origin.caller,
            "mode": self._mode,
            "pair": self._pair,
            "prompt_tokens": usage.prompt_tokens,
            "output_tokens": usage.completion_tokens,
            "nfe": usage.nfe,
            "finish_reason": reason,
            "code": code,
            "seconds": round(seconds, 6),
            "ttft": None if first_s is None else round(first_s, 6),
        }

    def _outcome(self, error: BaseException | None) -> tuple[str, str]:
        """Reason and status; whoever goes after the last block has had everything."""
        if self._log.finish_reason is not None:
            return self._log.finish_reason, "OK"
        if error is None or isinstance(error, _STOPPED):
            return "abort", "CANCELLED"
        return "error", self._recorder.code_of(error)

    def _trace(self, reason: str, code: str, seconds: float) -> Trace:
        usage = self._log.usage
        attributes = {
            "twotower.request_id": self._origin.request_id,
            "twotower.model": self._recorder.metrics.model,
            "twotower.mode": self._mode,
            "twotower.pair": self._pair,
            "twotower.prompt_tokens": usage.prompt_tokens,
            "twotower.output_tokens": usage.completion_tokens,
            "twotower.nfe": usage.nfe,
            "twotower.context_passes": usage.context_passes,
            "twotower.finish_reason": reason,
        }
        return Trace(
            traceparent=self._origin.traceparent,
            begin=self._began,
            mode=self._mode,
            end=self._began + seconds,
            attributes=attributes,
            error=code if reason == "error" else None,
            blocks=self._blocks,
        )
