"""Where values go: to Ray, whose agent on each node exports them, or to a registry of this process
where there is no Ray.

Both are read beside the path of requests. Ray adds up in C++ and hands over every few seconds.
"""

from __future__ import annotations

from typing import Any, Protocol

import ray
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client import Counter as LocalCounter
from prometheus_client import Gauge as LocalGauge
from prometheus_client import Histogram as LocalHistogram
from ray.util.metrics import Counter, Gauge, Histogram

from twotower.deployments.telemetry.names import PREFIX, Instrument, Labels, Table


class Instruments(Protocol):
    """The metrics of a table; labels are all those that the table names."""

    def add(self, name: str, value: float, labels: Labels) -> None:
        """Adds to a counter; 0 adds nothing."""

    def set(self, name: str, value: float, labels: Labels) -> None:
        """Sets a gauge."""

    def observe(self, name: str, value: float, labels: Labels) -> None:
        """Counts a value in a histogram."""

    def text(self) -> bytes | None:
        """Prometheus' text of all values; None if another process exports them."""


class RayInstruments:
    """Metrics of Ray, exported by its agent on the node of this process."""

    def __init__(self, table: Table) -> None:
        self._metrics: dict[str, Any] = {name: _of_ray(name, each) for name, each in table.items()}

    def add(self, name: str, value: float, labels: Labels) -> None:
        """Adds to a counter; 0 adds nothing."""
        if value:
            self._metrics[name].inc(value, labels)

    def set(self, name: str, value: float, labels: Labels) -> None:
        """Sets a gauge."""
        self._metrics[name].set(value, labels)

    def observe(self, name: str, value: float, labels: Labels) -> None:
        """Counts a value in a histogram."""
        self._metrics[name].observe(value, labels)

    def text(self) -> bytes | None:
        """None: the agents have the values of all processes."""
        return None


class LocalInstruments:
    """Metrics in a registry of their own."""

    def __init__(self, table: Table) -> None:
        self._registry = CollectorRegistry()
        self._metrics: dict[str, Any] = {
            name: _local(name, each, self._registry) for name, each in table.items()
        }

    def add(self, name: str, value: float, labels: Labels) -> None:
        """Adds to a counter; 0 adds nothing."""
        if value:
            self._metrics[name].labels(**labels).inc(value)

    def set(self, name: str, value: float, labels: Labels) -> None:
        """Sets a gauge."""
        self._metrics[name].labels(**labels).set(value)

    def observe(self, name: str, value: float, labels: Labels) -> None:
        """Counts a value in a histogram."""
        self._metrics[name].labels(**labels).observe(value)

    def text(self) -> bytes:
        """Prometheus' text of all values."""
        return generate_latest(self._registry)


def open_instruments(table: Table) -> Instruments:
    """The table's metrics, in Ray where this process belongs to it."""
    return RayInstruments(table) if ray.is_initialized() else LocalInstruments(table)


def _of_ray(name: str, what: Instrument) -> Any:
    if what.kind == "histogram":
        return Histogram(PREFIX + name, what.text, list(what.boundaries), what.labels)
    kind = Counter if what.kind == "counter" else Gauge
    return kind(PREFIX + name, what.text, what.labels)


def _local(name: str, what: Instrument, registry: CollectorRegistry) -> Any:
    given = (PREFIX + name, what.text, what.labels)
    if what.kind == "histogram":
        return LocalHistogram(*given, buckets=what.boundaries, registry=registry)
    return (LocalCounter if what.kind == "counter" else LocalGauge)(*given, registry=registry)
