"""Filters the lines that Ray prints in the process that has started it."""

from __future__ import annotations

import io
from typing import TextIO

# Followed by the raylet's log; the supervisor says in one line that it has ended.
_RAYLET_LOG = "Raylet is terminated"


class RayMessages(io.TextIOBase):
    """Stands in for stdout, which is for the service's own line: passes Ray's messages to `target`,
    less the log of a raylet that has ended."""

    def __init__(self, target: TextIO) -> None:
        self._target = target

    def write(self, text: str) -> int:
        """Takes a text in one piece, as `print` hands it over."""
        if _RAYLET_LOG not in text and text.strip():
            self._target.write(f"{text.rstrip()}\n")
        return len(text)

    def flush(self) -> None:
        """Passes on what is held."""
        self._target.flush()
