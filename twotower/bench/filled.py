"""A state pool whose rows begin with a long context of random values, so that nothing is read.

The speed of a pass does not depend on the values of a state as long as they are of a usual size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from twotower.towers.config.model_config import TwoTowerConfig
from twotower.towers.state.context_state import ContextState
from twotower.towers.state.pages import pages_for
from twotower.towers.state.pool import StatePool


class FilledPool(StatePool):
    """A pool whose rows open at `context` tokens, with conv and SSM states and K/V of
    normally distributed values. K/V are drawn once, for all pages."""

    def __init__(
        self,
        config: TwoTowerConfig,
        num_slots: int,
        num_pages: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(config, num_slots, num_pages, device, dtype)
        self.context = 0
        self.k.normal_()
        self.v.normal_()

    def open(self, capacity: int) -> ContextState:
        """A state with room for `capacity` tokens, `context` of which count as read; empty if that
        is 0.

        Raises CapacityError without a slot and the pages for it, ValueError if `context` tokens
        do not fit.
        """
        if self.context > capacity:
            raise ValueError(f"context: got {self.context}, expected at most {capacity}")
        state = super().open(capacity)
        if self.context:
            state.conv.normal_()
            state.ssm.normal_()
        state.position = state.length = self.context
        return state

    @contextmanager
    def rows_at(self, context: int, count: int, room: int) -> Iterator[list[ContextState]]:
        """States of `count` rows of `context` tokens with room for `room` more, closed at the end
        of the `with` block."""
        self.context = context
        states: list[ContextState] = []
        try:
            for _ in range(count):
                states.append(self.open(context + room))
            yield states
        finally:
            for state in states:
                self.close(state)


def pages_of_rows(rows: int, tokens: int) -> int:
    """Pages that hold so many rows of so many tokens."""
    return rows * pages_for(tokens)
