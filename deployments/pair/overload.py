"""The overload dial: while rows wait, those that begin cost less, as far as they allow it.

A request may declare floors for its denoiser steps and its confidence threshold. The more rows
wait for the pair when its row begins, the nearer to them it is served; then nothing changes until
its end, so that the output is a function of the request and of what is reported with its blocks.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

# In quarters: few enough different services to be told apart in figures.
NOTCHES = 4


@dataclass(frozen=True)
class OverloadDial:
    """Rows are served as asked up to `ease_from` waiting rows, nearer to their floors with more,
    and at their floors from `ease_full` on."""

    ease_from: int
    ease_full: int

    def __post_init__(self) -> None:
        if not 0 <= self.ease_from < self.ease_full:
            raise ValueError(
                f"ease_from: got {self.ease_from}, expected 0 to less than ease_full, "
                f"which is {self.ease_full}"
            )

    def eased(self, waiting: int) -> float:
        """Share of the way to its floors for a row that begins while `waiting` others wait: a
        multiple of 1 / NOTCHES from 0 to 1."""
        if waiting <= self.ease_from:
            return 0.0
        way = (waiting - self.ease_from) / (self.ease_full - self.ease_from)
        return (1 + math.floor(min(1.0, way) * (NOTCHES - 1))) / NOTCHES


# As many rows never wait.
NO_DIAL = OverloadDial(sys.maxsize - 1, sys.maxsize)
