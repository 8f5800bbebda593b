"""What a router has done and is doing: counts of its completions."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

from twotower.towers.decoding.services import Block
from twotower.towers.request.results import Usage


@dataclass
class RouterCounters:
    """Completions that wait for their first block, those that have one, and sums since the start.

    `requests_total` counts completions that have ended, whatever ended them.
    """

    running: int = 0
    waiting: int = 0
    requests_total: int = 0
    prompt_tokens_total: int = 0
    generation_tokens_total: int = 0
    nfe_total: int = 0
    context_passes_total: int = 0

    def report(self) -> dict[str, int]:
        """The counts by name."""
        return asdict(self)


class RouterLoad:
    """Keeps a router's counters, as its completions begin, commit and end."""

    def __init__(self) -> None:
        self.counters = RouterCounters()
        self._began = time.monotonic()

    @property
    def uptime_s(self) -> float:
        """Seconds since the router began."""
        return time.monotonic() - self._began

    def began(self, usage: Usage) -> None:
        """Counts a completion that waits for its first block."""
        self.counters.waiting += 1
        self.counters.prompt_tokens_total += usage.prompt_tokens

    def committed(self, block: Block, *, first: bool) -> None:
        """Counts a block, a completion's `first` one among others."""
        counters = self.counters
        if first:
            counters.waiting -= 1
            counters.running += 1
        counters.generation_tokens_total += len(block.token_ids)
        counters.nfe_total += block.nfe
        counters.context_passes_total += block.context_passes

    def ended(self, *, began: bool) -> None:
        """Counts the end of a completion, which `began` if it has had a block."""
        if began:
            self.counters.running -= 1
        else:
            self.counters.waiting -= 1
        self.counters.requests_total += 1
