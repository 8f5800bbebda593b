"""Calls of a running service's HTTP front, many at a time, until each has an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What became of a request.

    `status` is the service's last status, 0 if no answer was had at all; `body` the service's
    answer, or OpenAI's error object.
    """

    status: int
    body: dict[str, Any]
    request_id: str
    attempts: int

    @property
    def ok(self) -> bool:
        """True for a completion."""
        raise NotImplementedError

    @property
    def permanent(self) -> bool:
        """True if the same request would be refused again."""
        raise NotImplementedError


class ServiceCaller:
    """Posts requests to one or several services; belongs to the event loop that made it."""

    def __init__(
        self,
        targets: str | Sequence[str],
        *,
        concurrency: int,
        api_key: str | None = None,
        patience_s: float = 600.0,
    ) -> None:
        raise NotImplementedError

    async def post(self, url: str, body: Mapping[str, Any]) -> Answer:
        """The answer to a request; waits for one of `concurrency` places, and tries again."""
        raise NotImplementedError

    async def close(self) -> None:
        """Closes its connections."""
        raise NotImplementedError
