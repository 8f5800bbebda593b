"""What a context tower's links have carried: counts that each link adds to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Transfers:
    """Updates that receivers have taken, their bytes, and the time from the end of each update to
    its receipt, all in all. Links of one event loop may share it."""

    updates: int = 0
    num_bytes: int = 0
    nanoseconds: int = 0

    def took(self, num_bytes: int, nanoseconds: int) -> None:
        """Counts an update."""
        self.updates += 1
        self.num_bytes += num_bytes
        self.nanoseconds += nanoseconds
