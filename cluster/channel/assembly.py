"""The receiver's side of an update: its pieces put together to shares of layers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from twotower.cluster.channel import framing
from twotower.protos.v1 import state_pb2
from twotower.towers.state.update import StateUpdate


class Assembly:
    """Collects the pieces of one checked header.

    A layer's share that comes in one piece stays where it arrived; others are put together. With
    `keep` false, or once discarded, the bytes are only counted: a stream has to be read past
    updates that are not kept.
    """

    def __init__(self, header: state_pb2.StateHeader, *, keep: bool) -> None:
        self.header = header
        self.keep = keep
        # Replay weights belong to no layer's pass: each of their tensors is one share.
        self._parts = [_Part(spec, stacked=bool(header.row_id)) for spec in header.tensors]
        self._missing = sum(part.missing for part in self._parts)

    @property
    def complete(self) -> bool:
        return self._missing == 0

    def announce(self, pieces: Iterable[state_pb2.Piece]) -> int:
        """Counts pieces that are about to arrive; their bytes together.

        Raises FrameError for a piece that leaves a gap, overlaps or reaches past its tensor.
        """
        total = 0
        for piece in pieces:
            if piece.tensor >= len(self._parts):
                raise framing.FrameError(
                    f"pieces: got tensor {piece.tensor}, expected less than {len(self._parts)}"
                )
            self._parts[piece.tensor].announce(piece.offset, piece.size)
            total += piece.size
        self._missing -= total
        return total

    def fill(self, pieces: Iterable[state_pb2.Piece], data: Tensor) -> None:
        """Takes the bytes of announced pieces, uint8 [n], one after the other.

        Shares become views of `data`, which may not change from now on.
        """
        if not self.keep:
            return
        begin = 0
        for piece in pieces:
            end = begin + piece.size
            self._parts[piece.tensor].fill(piece.offset, data, begin, end)
            begin = end

    def discard(self) -> None:
        """Lets go of what has arrived."""
        self.keep = False
        for part in self._parts:
            part.shares = []
            part.unfinished = None

    def tensors(self) -> dict[str, list[Tensor]]:
        """The shares of all tensors, once complete and kept."""
        assert self.complete
        assert self.keep
        return {part.name: part.all_shares() for part in self._parts}

    def weights(self) -> dict[str, Tensor]:
        """Complete replay weights, copied out of the frames."""
        return {name: whole.clone() for name, (whole,) in self.tensors().items()}

    def update(self) -> StateUpdate:
        """The complete update of a row."""
        return StateUpdate(framing.plan_of(self.header), self.tensors())


class _Part:
    """One tensor of an update: shares of one size, the last of them perhaps unfinished."""

    def __init__(self, spec: state_pb2.TensorSpec, *, stacked: bool) -> None:
        self.name = spec.name
        self.missing = int(spec.bytes)
        self.shares: list[Tensor] = []
        self.unfinished: Tensor | None = None
        self._announced = 0
        self._dtype = framing.DTYPES[spec.dtype]
        self._count, *shape = spec.shape if stacked else (1, *spec.shape)
        self._shape = tuple(shape)
        self._size = self.missing // max(1, self._count)

    def announce(self, offset: int, size: int) -> None:
        if offset != self._announced:
            raise framing.FrameError(
                f"{self.name}: got a piece at {offset}, expected one at {self._announced}"
            )
        if not 0 < size <= self.missing:
            raise framing.FrameError(
                f"{self.name}: got a piece of {size} bytes, expected 1 to {self.missing} more"
            )
        self._announced += size
        self.missing -= size

    def fill(self, offset: int, data: Tensor, begin: int, end: int) -> None:
        """Takes data[begin:end], the bytes from `offset` on."""
        while begin < end:
            at = offset % self._size
            whole = 0 if at else (end - begin) // self._size
            stop = begin + whole * self._size if whole else min(begin + self._size - at, end)
            if whole:
                self._add(data[begin:stop], whole)
            else:
                self._take(at, data[begin:stop])
            offset += stop - begin
            begin = stop

    def all_shares(self) -> list[Tensor]:
        """The shares, once all bytes are there."""
        if self._size:
            return self.shares
        return [torch.empty(self._shape, dtype=self._dtype) for _ in range(self._count)]

    def _take(self, at: int, data: Tensor) -> None:
        """Takes a part of the next share, its bytes from `at` on."""
        if self.unfinished is None:
            self.unfinished = torch.empty(self._size, dtype=torch.uint8, device=data.device)
        end = at + data.shape[0]
        self.unfinished[at:end] = data
        if end == self._size:
            data, self.unfinished = self.unfinished, None
            self._add(data, 1)

    def _add(self, data: Tensor, count: int) -> None:
        """Appends `count` whole shares, whose bytes are `data`."""
        width = self._dtype.itemsize
        if data.data_ptr() % width or data.storage_offset() % width:
            data = data.clone()
        self.shares.extend(data.view(self._dtype).view(count, *self._shape).unbind(0))
