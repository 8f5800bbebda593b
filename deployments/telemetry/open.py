"""Telemetry of a router, as the operator's settings want it."""

from __future__ import annotations

from typing import Protocol

from twotower.deployments.telemetry.errors import ERROR_ANSWERS
from twotower.deployments.telemetry.exporter import check_exporter
from twotower.deployments.telemetry.logs import name_requests
from twotower.deployments.telemetry.record import CodeOf, Recorder, TraceSink
from twotower.deployments.telemetry.router_metrics import RouterMetrics


class Settings(Protocol):
    """The settings that telemetry reads; see ServiceConfig."""

    @property
    def otlp_endpoint(self) -> str | None:
        """A collector of traces."""

    @property
    def trace_sample_ratio(self) -> float:
        """Share of requests that are traced."""

    def shown_name(self) -> str:
        """The model's name."""


def open_recorder(settings: Settings, code_of: CodeOf) -> Recorder:
    """The recorder of this process's router. Raises ConfigError for tracing without its package."""
    metrics = RouterMetrics(settings.shown_name())
    ERROR_ANSWERS.listen(metrics.answered_by_error)
    name_requests()
    return Recorder(metrics, code_of, open_traces(settings))


def open_traces(settings: Settings) -> TraceSink | None:
    """Tracing to the collector of the settings; None without one. Raises ConfigError."""
    if settings.otlp_endpoint is None:
        return None
    check_exporter()
    # Its packages cost time and memory, and most services have no collector.
    from twotower.deployments.telemetry.tracing import open_tracing

    return open_tracing(settings.otlp_endpoint, settings.trace_sample_ratio)
