"""Rows' context states in a tower's memory.

A row holds one slot and the pages of its whole capacity from the start, so that a row that was let
in never runs out of room.
"""

from __future__ import annotations

from twotower.towers.errors import CapacityError
from twotower.towers.state.context_state import ContextState
from twotower.towers.state.pages import pages_for
from twotower.towers.state.tensors import StateTensors


class StatePool(StateTensors):
    """Opens and closes rows' states in a tower's slots and pages. Not for several threads."""

    def open(self, capacity: int) -> ContextState:
        """An empty state with room for `capacity` tokens.

        Raises CapacityError without a slot and the pages for it.
        """
        if not self.room_for(capacity):
            raise CapacityError(
                f"row: got {capacity} tokens = {pages_for(capacity)} pages, expected at most the "
                f"{self.pages.num_free} free pages and a slot of the {self.slots.num_free} free"
            )
        pages = self.pages.allocate(pages_for(capacity))
        return ContextState(self, self.slots.allocate(), pages, capacity)

    def close(self, state: ContextState) -> None:
        """Takes a state's slot and pages back; a second time it does nothing."""
        state.release()

    def room_for(self, capacity: int) -> bool:
        """True if `open` would succeed."""
        free = min(self.pages.num_free, self.most_pages)
        return self.slots.num_free > 0 and pages_for(capacity) <= free

    def could_ever_hold(self, capacity: int) -> bool:
        """True if a row of `capacity` tokens fits into the empty pool and the model's context."""
        return self.slots.num_slots > 0 and pages_for(capacity) <= self.most_pages

    @property
    def slots_used(self) -> int:
        """Slots that rows hold."""
        return self.slots.num_slots - self.slots.num_free

    @property
    def pages_used(self) -> int:
        """Pages that rows and the prefix cache hold."""
        return self.pages.num_pages - self.pages.num_free

    @property
    def state_bytes(self) -> int:
        """Bytes of the slots and pages in use."""
        return self.slots_used * self.slot_bytes + self.pages_used * self.page_bytes
