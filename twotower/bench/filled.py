"""Rows that are far into their context without anything having been read: random memory.

Speed does not depend on what a state holds as long as it is of a usual size, so a row of 32 K
tokens is there at once.
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
    """A pool whose rows open at `context` tokens, with random K/V, histories and SSM states of
    `state_scale`. K/V are drawn once: every row finds some in its pages."""

    def __init__(
        self,
        config: TwoTowerConfig,
        num_slots: int,
        num_pages: int,
        device: torch.device,
        dtype: torch.dtype,
        state_scale: float = 1.0,
    ) -> None:
        super().__init__(config, num_slots, num_pages, device, dtype)
        self.context = 0
        self.state_scale = state_scale
        self.k.normal_()
        self.v.normal_()

    def open(self, capacity: int) -> ContextState:
        """A state with room for `capacity` tokens that stands at `context`.

        Raises CapacityError without a slot and the pages for it, ValueError if `context` tokens
        do not fit.
        """
        if self.context > capacity:
            raise ValueError(f"context: got {self.context}, expected at most {capacity}")
        state = super().open(capacity)
        state.conv.normal_()
        state.ssm.normal_(0.0, self.state_scale)
        state.position = state.length = self.context
        return state

    @contextmanager
    def rows_at(self, context: int, count: int, room: int) -> Iterator[list[ContextState]]:
        """`count` rows of `context` tokens with room for `room` more, taken back at the end."""
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
