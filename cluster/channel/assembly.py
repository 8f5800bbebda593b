"""The receiver's side of one update: where its pieces go, and when it is complete."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from twotower.cluster.channel import framing
from twotower.protos.v1 import state_pb2
from twotower.towers.update import StateUpdate


class Assembly:
    """Collects the pieces of one checked header on a device.

    With `keep` false, or once discarded, the bytes are only counted: a stream has to be read past
    updates that nobody wants.
    """

    def __init__(
        self, header: state_pb2.StateHeader, *, keep: bool, device: torch.device | None = None
    ) -> None:
        self.header = header
        self.keep = keep
        self._sizes = [int(spec.bytes) for spec in header.tensors]
        self._filled = [0] * len(self._sizes)
        self._missing = sum(self._sizes)
        self._buffers = [
            torch.empty(size if keep else 0, dtype=torch.uint8, device=device)
            for size in self._sizes
        ]

    @property
    def complete(self) -> bool:
        return self._missing == 0

    def place(self, pieces: Iterable[state_pb2.Piece]) -> list[Tensor | None]:
        """Where each piece's bytes go: uint8 views, None for bytes that nobody wants.

        Raises FrameError for a piece that leaves a gap, overlaps or reaches past its tensor.
        """
        return [self._place(piece.tensor, piece.offset, piece.size) for piece in pieces]

    def discard(self) -> None:
        """Lets go of what has arrived."""
        self.keep = False
        self._buffers = []

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, once complete and kept; they own their memory."""
        assert self.complete
        assert self.keep
        return {
            spec.name: buffer.view(framing.DTYPES[spec.dtype]).reshape(tuple(spec.shape))
            for spec, buffer in zip(self.header.tensors, self._buffers, strict=True)
        }

    def update(self) -> StateUpdate:
        """The complete update of a row."""
        return StateUpdate(framing.plan_of(self.header), self.tensors())

    def _place(self, index: int, offset: int, size: int) -> Tensor | None:
        if index >= len(self._sizes):
            raise framing.FrameError(
                f"pieces: got tensor {index}, expected less than {len(self._sizes)}"
            )
        filled, left = self._filled[index], self._sizes[index] - self._filled[index]
        name = self.header.tensors[index].name
        if offset != filled:
            raise framing.FrameError(f"{name}: got a piece at {offset}, expected one at {filled}")
        if not 0 < size <= left:
            raise framing.FrameError(
                f"{name}: got a piece of {size} bytes, expected 1 to {left} more"
            )
        self._filled[index] += size
        self._missing -= size
        return self._buffers[index][offset : offset + size] if self.keep else None
