"""Rows that a receiver follows: epochs, order of updates, and unfinished updates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from twotower.cluster.channel.assembly import Assembly
from twotower.cluster.channel.framing import FrameError
from twotower.protos.v1 import state_pb2
from twotower.towers.state.update import StateUpdate

Outcome = state_pb2.StateReceipt.Outcome


@dataclass
class _Mirror:
    """Epoch and index of a row's next update, and the part of it that has arrived."""

    epoch: int = 0
    next_index: int = 0
    assembly: Assembly | None = None


class Mirrors:
    """Rows that are followed. `apply(row_id, update)` raises ValueError for an update that does not
    continue the row."""

    def __init__(self, apply: Callable[[str, StateUpdate], None]) -> None:
        self._apply = apply
        self._rows: dict[str, _Mirror] = {}
        self._epoch = 0

    def __len__(self) -> int:
        return len(self._rows)

    def open(self, row_id: str) -> None:
        """Starts to follow a row."""
        self.forget(row_id)
        self._rows[row_id] = _Mirror()

    def forget(self, row_id: str) -> None:
        """Stops to follow a row and drops its unfinished update; an unknown row is fine."""
        mirror = self._rows.pop(row_id, None)
        if mirror is not None and mirror.assembly is not None:
            mirror.assembly.discard()

    def admit(self, header: state_pb2.StateHeader) -> bool:
        """True if the update that a header announces is to be kept; ends older epochs.

        Raises FrameError if the row has an unfinished update already.
        """
        if header.epoch > self._epoch:
            self._epoch = header.epoch
            for mirror in self._rows.values():
                if mirror.assembly is not None:
                    mirror.assembly.discard()
                    mirror.assembly = None
        if header.epoch < self._epoch:
            return False
        if not header.row_id:
            return True
        mirror_or_none = self._rows.get(header.row_id)
        if mirror_or_none is None:
            return False
        if mirror_or_none.assembly is not None:
            raise FrameError(
                f"row_id: got a new update of {header.row_id!r}, expected the last one's end"
            )
        return True

    def is_latest(self, header: state_pb2.StateHeader) -> bool:
        """True if no newer link has spoken since."""
        return header.epoch >= self._epoch

    def hold(self, assembly: Assembly) -> None:
        """Remembers the unfinished update of a row."""
        mirror = self._rows.get(assembly.header.row_id)
        if assembly.keep and mirror is not None:
            mirror.assembly = assembly

    def drop(self, assembly: Assembly) -> None:
        """Drops an unfinished update."""
        mirror = self._rows.get(assembly.header.row_id)
        if mirror is not None and mirror.assembly is assembly:
            mirror.assembly = None
        assembly.discard()

    def settle(self, assembly: Assembly) -> Outcome:
        """Applies a complete update if it is the next of its row."""
        header = assembly.header
        update = assembly.update() if assembly.keep else None
        self.drop(assembly)
        if header.epoch < self._epoch:
            return state_pb2.StateReceipt.OUTCOME_STALE
        mirror = self._rows.get(header.row_id)
        if mirror is None or update is None:
            return state_pb2.StateReceipt.OUTCOME_IGNORED
        if header.epoch > mirror.epoch:
            mirror.epoch, mirror.next_index = header.epoch, 0
        if header.block_index < mirror.next_index:
            return state_pb2.StateReceipt.OUTCOME_IGNORED
        if header.block_index > mirror.next_index:
            return state_pb2.StateReceipt.OUTCOME_REFUSED
        try:
            self._apply(header.row_id, update)
        except ValueError:
            return state_pb2.StateReceipt.OUTCOME_REFUSED
        mirror.next_index += 1
        return state_pb2.StateReceipt.OUTCOME_APPLIED
