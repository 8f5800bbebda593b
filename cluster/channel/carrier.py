"""How the bytes of a frame's pieces travel: inside the frame, or beside it through a group."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from twotower.cluster.channel.framing import CHUNK_BYTES, FrameError
from twotower.cluster.channel.process_group import GROUP_FRAME_BYTES, GroupEnd
from twotower.protos.v1 import state_pb2


class CarrierError(RuntimeError):
    """The bytes beside the stream do not come or go."""


class Carrier(Protocol):
    """One end of a link's way for bytes.

    A frame has at most `frame_bytes` of them; they lie on `device` at both ends.
    """

    frame_bytes: int
    device: torch.device

    def payload(self, slices: Sequence[Tensor]) -> list[np.ndarray]:
        """What of the bytes goes into the frame itself."""

    async def send(self, slices: Sequence[Tensor]) -> None:
        """Called when the frame is written: sends what did not go into it.

        Returns before all is sent, but not before all of the call before it is. Raises
        CarrierError.
        """

    async def receive(
        self,
        pieces: Sequence[state_pb2.Piece],
        places: Sequence[Tensor | None],
        payload: memoryview,
    ) -> None:
        """Fills the places of a frame's pieces. Raises FrameError or CarrierError."""

    def close(self) -> None:
        """Gives up what is on the way."""


class InFrame:
    """The bytes are the frame's payload."""

    frame_bytes = CHUNK_BYTES
    device = torch.device("cpu")

    def payload(self, slices: Sequence[Tensor]) -> list[np.ndarray]:
        return [one.numpy() for one in slices]

    async def send(self, slices: Sequence[Tensor]) -> None:
        """Nothing is left to send."""

    async def receive(
        self,
        pieces: Sequence[state_pb2.Piece],
        places: Sequence[Tensor | None],
        payload: memoryview,
    ) -> None:
        check_sizes(pieces, len(payload), self.frame_bytes)
        begin = 0
        for piece, place in zip(pieces, places, strict=True):
            if place is not None:
                place.numpy()[:] = np.frombuffer(payload, np.uint8, piece.size, begin)
            begin += piece.size

    def close(self) -> None:
        """Nothing is on the way."""


class BesideFrame:
    """The bytes go through a process group, announced by the frames."""

    frame_bytes = GROUP_FRAME_BYTES

    def __init__(self, end: GroupEnd, failed: Callable[[str], None]) -> None:
        self.device = end.device
        self._end = end
        self._failed = failed
        self._last: asyncio.Future[None] | None = None

    def payload(self, slices: Sequence[Tensor]) -> list[np.ndarray]:  # noqa: ARG002
        return []

    async def send(self, slices: Sequence[Tensor]) -> None:
        # The next frame is announced while these bytes go: the receiver never waits for news.
        before, self._last = self._last, self._end.send(slices)
        self._last.add_done_callback(self._look_at)
        if before is not None:
            await _carried(before)

    async def receive(
        self,
        pieces: Sequence[state_pb2.Piece],
        places: Sequence[Tensor | None],
        payload: memoryview,
    ) -> None:
        if payload:
            raise FrameError(f"payload: got {len(payload)} bytes, expected none beside a group")
        sizes = [int(piece.size) for piece in pieces]
        check_sizes(pieces, sum(sizes), self.frame_bytes)
        if sizes:
            await _carried(self._end.receive(places, sizes))

    def close(self) -> None:
        self._end.close()

    def _look_at(self, sending: asyncio.Future[None]) -> None:
        if not sending.cancelled() and (error := sending.exception()) is not None:
            self._failed(str(error))


def check_sizes(pieces: Sequence[state_pb2.Piece], num_bytes: int, limit: int) -> None:
    """Raises FrameError unless the pieces are `num_bytes` together, and these within the limit."""
    announced = sum(piece.size for piece in pieces)
    if announced != num_bytes or announced > limit:
        raise FrameError(
            f"payload: got {num_bytes} bytes, expected the {announced} of the pieces, "
            f"at most {limit}"
        )


async def _carried(transfer: asyncio.Future[None]) -> None:
    try:
        # Shielded: the thread cannot be stopped, and its tensors are in use until it has ended.
        await asyncio.shield(transfer)
    except RuntimeError as error:
        raise CarrierError(str(error)) from None
