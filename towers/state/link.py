"""The interface of a link, which carries a context tower's states to a denoiser tower."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from twotower.towers.state.context_state import ContextState
from twotower.towers.state.update import UpdatePlan


class UpdateWriter(Protocol):
    """An update of a row on its way to the other tower.

    A pass puts shares from its own thread while it computes. `takes_shares` is False where the
    mirror reads the state itself: a pass then puts nothing.
    """

    takes_shares: bool

    def put(self, name: str, layer: int, tensor: Tensor) -> None:
        """Takes a layer's share, named and shaped as in `UpdatePlan.shapes` without the first axis.

        It is not copied: it stays unchanged until `finish` has returned or the row is given up.
        Names that the plan does not hold are passed over.
        """

    async def finish(self) -> None:
        """Called after the last `put`; returns once the mirror has the update.

        Raises UnavailableError if the link is broken or the receiver refuses.
        """

    def abort(self) -> None:
        """Gives the update up; the mirror stays where it is. After `finish` it does nothing."""


class StateLink(Protocol):
    """Carries updates of rows from a context tower to a denoiser tower, in order per row."""

    def open(self, row_id: str) -> None:
        """Starts to carry a row."""

    def begin(self, row_id: str, state: ContextState, plan: UpdatePlan) -> UpdateWriter:
        """Starts the row's next update; the update before it has finished."""

    def forget(self, row_id: str) -> None:
        """Stops to carry a row; an unknown row is fine."""
