"""Whether this installation can export traces."""

from __future__ import annotations

from importlib.util import find_spec

from twotower.towers.errors import ConfigError

_EXPORTER = "opentelemetry.exporter.otlp.proto.http"


def check_exporter() -> None:
    """Raises ConfigError without the exporter's package."""
    try:
        found = find_spec(_EXPORTER)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise ConfigError(
            "otlp_endpoint: needs the exporter, which is not installed; install twotower[tracing]"
        )
