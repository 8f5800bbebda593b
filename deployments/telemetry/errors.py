"""Requests that are answered by an error, whichever front answers: told here, where they are made.

A process has one router, so it has one listener.
"""

from __future__ import annotations

from collections.abc import Callable


def _nobody(_code: str) -> None:
    """Nobody listens, as in a process without a router."""


class ErrorAnswers:
    """Passes on the gRPC status of each answer that is an error."""

    def __init__(self) -> None:
        self._tell: Callable[[str], None] = _nobody

    def listen(self, tell: Callable[[str], None]) -> None:
        """Sets who is told, in place of the last."""
        self._tell = tell

    def note(self, code: str) -> None:
        """Tells of an answer."""
        self._tell(code)


ERROR_ANSWERS = ErrorAnswers()
