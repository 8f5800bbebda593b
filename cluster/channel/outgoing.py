"""The sender's side of an update, between the thread that computes it and the stream."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from operator import itemgetter

import torch
from torch import Tensor

from twotower.cluster.channel.framing import CHUNK_BYTES, Piece
from twotower.protos.v1 import state_pb2
from twotower.towers.state.update import UpdateBuilder

_PLACE = itemgetter(0, 1)


class ShareQueue:
    """Shares that wait to be sent, in the order in which they came; nothing is copied."""

    def __init__(self) -> None:
        # Index of the header's tensor, offset in it, size, the contiguous share.
        self._waiting: deque[tuple[int, int, int, Tensor]] = deque()

    def put(self, tensor: int, offset: int, share: Tensor) -> None:
        """Appends a contiguous share, which begins at byte `offset` of the header's tensor."""
        if share.nbytes:
            self._waiting.append((tensor, offset, share.nbytes, share))

    def take(self, limit: int) -> tuple[list[Piece], list[Tensor]]:
        """The next frame's pieces, at most `limit` bytes, and their contiguous tensors.

        Only a share above the limit is cut: the receiver need not copy a share that arrives whole.
        Shares of one tensor are put together, so that a frame has few pieces.
        """
        chosen, room = list[tuple[int, int, int, Tensor]](), limit
        while self._waiting and (not chosen or self._waiting[0][2] <= room):
            one = self._waiting.popleft()
            if one[2] > room:
                index, offset, size, share = one
                data = share.view(-1).view(torch.uint8)
                self._waiting.appendleft((index, offset + room, size - room, data[room:]))
                one = (index, offset, room, data[:room])
            chosen.append(one)
            room -= one[2]
        chosen.sort(key=_PLACE)
        return _merged(chosen), [share for _, _, _, share in chosen]

    def clear(self) -> None:
        """Drops all shares."""
        self._waiting.clear()


def _merged(shares: Sequence[tuple[int, int, int, Tensor]]) -> list[Piece]:
    """The pieces that neighbouring shares make."""
    pieces = list[Piece]()
    last, begin, end = -1, 0, 0
    for index, offset, size, _ in shares:
        if index != last:
            if last >= 0:
                pieces.append(Piece(last, begin, end - begin))
            last, begin = index, offset
        end = offset + size
    if last >= 0:
        pieces.append(Piece(last, begin, end - begin))
    return pieces


class Outgoing:
    """One update on its way. `put` runs in the engine's thread, everything else in the loop's.

    Each counter has one writer: a share counts only once it is in the queue.
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
        self.num_bytes = sum(tensor.nbytes for tensor in builder.layout.values())
        self._builder = builder
        self._wake = wake
        self._indices = {name: index for index, name in enumerate(builder.layout)}
        self._queue = ShareQueue()
        self._put = 0
        self.sent_bytes = 0

    def put(self, name: str, layer: int, tensor: Tensor) -> None:
        """Takes one layer's share; wakes the sender for each full portion."""
        if self.dropped or (share := self._builder.keep(name, layer, tensor)) is None:
            return
        size = share.nbytes
        self._queue.put(self._indices[name], layer * size, share)
        before = self._put
        self._put += size
        if before // CHUNK_BYTES != self._put // CHUNK_BYTES:
            self._wake()

    def drop(self) -> None:
        """Gives the update up: what has not been sent will not be."""
        self.dropped = True
        self._queue.clear()

    @property
    def complete(self) -> bool:
        """True once every share has been put."""
        return self._builder.complete

    @property
    def ready(self) -> bool:
        """True if there is enough for a frame."""
        return self.finished or self.dropped or self._put - self.sent_bytes >= CHUNK_BYTES

    @property
    def sent(self) -> bool:
        """True once all bytes of a finished update were taken."""
        return self.finished and self.sent_bytes == self.num_bytes

    def take(self, limit: int) -> tuple[list[Piece], list[Tensor]]:
        """The next frame's pieces, at most `limit` bytes, and their bytes."""
        pieces, slices = self._queue.take(limit)
        self.sent_bytes += sum(piece.size for piece in pieces)
        return pieces, slices

    def fail(self, error: Exception) -> None:
        """Raises an error in the task that waits for the update."""
        for waiting in (self.written, self.receipt):
            if not waiting.done():
                waiting.set_exception(error)
                # Only one of the two is awaited.
                waiting.exception()
