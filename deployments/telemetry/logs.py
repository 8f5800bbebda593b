"""Logs: the name of a request in each of its lines, and one line for each completion that ends.

Lines have counts and times, never a prompt, a text, ids or a key.
"""

from __future__ import annotations

import logging
from contextvars import ContextVar
from typing import Any, Literal

import ray

LOGGER = "ray.serve"
LogFormat = Literal["text", "json"]
# The request that the present task works on, "" outside of any.
REQUEST_ID: ContextVar[str] = ContextVar("twotower_request_id", default="")

logger = logging.getLogger(LOGGER)


class RequestNames(logging.Filter):
    """Gives each record the name of its request, in place of the one that Serve has made up."""

    def filter(self, record: logging.LogRecord) -> bool:
        """See logging.Filter; drops nothing."""
        name = REQUEST_ID.get()
        if name:
            record.request_id = name
        return True


_NAMES = RequestNames()


def name_requests() -> None:
    """Names requests in all that this process's handlers of Serve's log write."""
    for handler in logger.handlers:
        # Behind Serve's own filters; a second time it changes nothing.
        handler.addFilter(_NAMES)


def log_completion(fields: dict[str, Any]) -> None:
    """Writes the line of a completion: `key=value` in the text, and fields in JSON."""
    if not logger.isEnabledFor(logging.INFO):
        return
    words = " ".join(f"{name}={_shown(value)}" for name, value in fields.items())
    logger.info("completion %s", words, extra=fields)


def serve_logging(log_format: LogFormat) -> dict[str, Any]:
    """Serve's logging_config of a deployment."""
    return {"encoding": "JSON" if log_format == "json" else "TEXT"}


def worker_logging(log_format: LogFormat) -> dict[str, Any]:
    """The options of `ray.init` for the logs of towers, which are no replicas of Serve."""
    if log_format == "text":
        return {}
    return {"logging_config": ray.LoggingConfig(encoding="JSON", log_level="WARNING")}


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
