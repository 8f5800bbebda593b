"""The sender's side of one update, between the thread that computes it and the stream."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from twotower.cluster.channel.framing import CHUNK_BYTES, Piece
from twotower.protos.v1 import state_pb2
from twotower.towers.update import UpdateBuilder


def flat_bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor's memory, uint8 [n]."""
    return tensor.view(-1).view(torch.uint8)


class Pieces:
    """Cuts tensors into pieces in order."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._flat = [flat_bytes(tensor) for tensor in tensors]
        self._taken = [0] * len(self._flat)

    def take(self, final: Iterable[int], limit: int) -> list[Piece]:
        """The next pieces, at most `limit` bytes; `final` counts each tensor's bytes that are."""
        pieces = []
        for index, end in enumerate(final):
            begin = self._taken[index]
            size = min(end - begin, limit)
            if size > 0:
                pieces.append(Piece(index, begin, size))
                self._taken[index] += size
                limit -= size
        return pieces

    def slices(self, pieces: Iterable[Piece]) -> list[Tensor]:
        """The pieces' bytes, uint8 views."""
        return [
            self._flat[piece.tensor][piece.offset : piece.offset + piece.size] for piece in pieces
        ]

    def sizes(self) -> list[int]:
        """Bytes of every tensor."""
        return [flat.numel() for flat in self._flat]


class Outgoing:
    """One update on its way. `put` runs in the engine's thread, everything else in the loop's.

    Each counter has one writer: a share counts only once its bytes are in place.
    """

    def __init__(
        self,
        sequence: int,
        header: state_pb2.StateHeader,
        builder: UpdateBuilder,
        wake: Callable[[], object],
    ) -> None:
        self.sequence = sequence
        self.header = header
        self.begun = False
        self.finished = False
        self.dropped = False
        self.written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.receipt: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._builder = builder
        self._wake = wake
        self._names = list(builder.tensors)
        self._layer_bytes = {
            name: tensor[0].nbytes if len(tensor) else 0 for name, tensor in builder.tensors.items()
        }
        self._pieces = Pieces(builder.tensors.values())
        self.num_bytes = sum(self._pieces.sizes())
        self._final = 0
        self._taken = 0

    def put(self, name: str, layer: int, tensor: Tensor) -> None:
        """Copies one layer's share; wakes the sender for each full portion."""
        if self.dropped or name not in self._layer_bytes:
            return
        self._builder.put(name, layer, tensor)
        before = self._final
        self._final += self._layer_bytes[name]
        if before // CHUNK_BYTES != self._final // CHUNK_BYTES:
            self._wake()

    @property
    def complete(self) -> bool:
        """Whether every share has been put."""
        return self._builder.complete

    @property
    def ready(self) -> bool:
        """Whether a frame is worth writing now."""
        return self.finished or self.dropped or self._final - self._taken >= CHUNK_BYTES

    @property
    def sent(self) -> bool:
        """Whether what was taken is all that there will be."""
        return self.finished and self._taken == self.num_bytes

    def take(self, limit: int) -> tuple[list[Piece], list[Tensor]]:
        """The next frame's pieces, at most `limit` bytes, and their bytes."""
        final = [self._builder.filled_bytes(name) for name in self._names]
        pieces = self._pieces.take(final, limit)
        self._taken += sum(piece.size for piece in pieces)
        return pieces, self._pieces.slices(pieces)

    def fail(self, error: Exception) -> None:
        """Tells whoever waits for the update."""
        for waiting in (self.written, self.receipt):
            if not waiting.done():
                waiting.set_exception(error)
                # Only one of the two is awaited.
                waiting.exception()
