"""Traces of completions, exported to an OpenTelemetry collector over OTLP.

Imported only if the operator has set an endpoint. Spans are made in a thread of their own, once a
completion has ended, and sent in batches.
"""

from __future__ import annotations

import logging
import os
from concurrent.futures import Future, ThreadPoolExecutor
from threading import BoundedSemaphore

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import twotower
from twotower.deployments.telemetry.spans import Phase, Trace

logger = logging.getLogger("ray.serve")

TRACES_PATH = "/v1/traces"
# Completions whose spans are still to be made; more are not traced.
MAX_WAITING = 1024
# Spans that wait for the exporter: a long completion has thousands.
MAX_SPANS = 1 << 15


class Tracing:
    """Makes and exports the traces of completions.

    `sample_ratio` of those without a parent are traced; those with one are traced if it is.
    """

    def __init__(self, exporter: SpanExporter, sample_ratio: float = 1.0) -> None:
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(sample_ratio)),
            resource=Resource.create(
                {
                    "service.name": "twotower",
                    "service.version": twotower.__version__,
                    "process.pid": os.getpid(),
                }
            ),
        )
        self._sender = BatchSpanProcessor(exporter, max_queue_size=MAX_SPANS)
        self._provider.add_span_processor(self._sender)
        self._tracer = self._provider.get_tracer("twotower", twotower.__version__)
        self._scope = InstrumentationScope("twotower", twotower.__version__)
        self._maker = ThreadPoolExecutor(1, thread_name_prefix="spans")
        self._places = BoundedSemaphore(MAX_WAITING)

    def ended(self, completion: Trace) -> None:
        """Takes a completion that has ended; its spans are made soon, elsewhere."""
        if not self._places.acquire(blocking=False):
            logger.debug("%d completions wait for their spans: one is not traced", MAX_WAITING)
            return
        self._maker.submit(self._make, completion).add_done_callback(self._made)

    def flush(self) -> None:
        """Waits until all that has ended was sent."""
        # The last in the thread's queue.
        self._maker.submit(lambda: None).result()
        self._provider.force_flush()

    def close(self) -> None:
        """Sends what is left."""
        self._maker.shutdown()
        self._provider.shutdown()

    def _made(self, made: Future[None]) -> None:
        self._places.release()
        error = made.exception()
        if error is not None:
            logger.error("the spans of a completion could not be made", exc_info=error)

    def _make(self, completion: Trace) -> None:
        carrier = {"traceparent": completion.traceparent} if completion.traceparent else {}
        root = self._tracer.start_span(
            "completion",
            context=TraceContextTextMapPropagator().extract(carrier),
            kind=SpanKind.SERVER,
            attributes=completion.attributes,
            start_time=_nanoseconds(completion.begin),
        )
        if root.is_recording():
            for phase in completion.phases():
                self._sender.on_end(self._span(phase, root.get_span_context()))
        if completion.error is not None:
            root.set_status(Status(StatusCode.ERROR, completion.error))
        root.end(_nanoseconds(completion.end))

    def _span(self, phase: Phase, parent: SpanContext) -> ReadableSpan:
        """A span that has ended already, which costs less than to begin and to end one."""
        number = self._provider.id_generator.generate_span_id()
        return ReadableSpan(
            phase.name,
            SpanContext(parent.trace_id, number, False, parent.trace_flags, parent.trace_state),
            parent=parent,
            resource=self._provider.resource,
            attributes=phase.attributes,
            instrumentation_scope=self._scope,
            start_time=_nanoseconds(phase.begin),
            end_time=_nanoseconds(phase.end),
        )


def open_tracing(endpoint: str, sample_ratio: float) -> Tracing:
    """Tracing to the collector at `endpoint`, such as http://localhost:4318."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return Tracing(OTLPSpanExporter(endpoint.rstrip("/") + TRACES_PATH), sample_ratio)


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
