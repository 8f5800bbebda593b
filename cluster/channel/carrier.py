"""Carriers of the bytes of a frame's pieces: inside the frame, or beside it through a group."""

from __future__ import annotations

import asyncio
import ctypes
import warnings
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from twotower.cluster.channel.framing import CHUNK_BYTES, FrameError, Memory
from twotower.cluster.channel.process_group import GROUP_FRAME_BYTES, GroupEnd

with warnings.catch_warnings():
    # torch warns once that frombuffer's memory is not to be written; updates are only read.
    warnings.simplefilter("ignore")
    torch.frombuffer(bytes(1), dtype=torch.uint8)


class CarrierError(RuntimeError):
    """The bytes beside the stream do not come or go."""


class Carrier(Protocol):
    """One end of the transport of a link's bytes.

    A frame has at most `frame_bytes` of them; they lie on `device` at both ends.
    """

    frame_bytes: int
    device: torch.device

    def payload(self, slices: Sequence[Tensor]) -> list[Memory]:
        """The bytes that go into the frame itself; read while the tensors live."""

    async def send(self, slices: Sequence[Tensor]) -> None:
        """Called when the frame is written: sends what did not go into it.

        Returns before all is sent, but not before all of the call before it is. Raises
        CarrierError.
        """

    async def receive(self, size: int, payload: memoryview) -> Tensor:
        """The bytes of a frame that announces `size` of them: uint8 [size], to be read only.

        Raises FrameError or CarrierError.
        """

    def close(self) -> None:
        """Gives up what is on the way."""


class InFrame:
    """The bytes are the frame's payload."""

    frame_bytes = CHUNK_BYTES
    device = torch.device("cpu")

    def payload(self, slices: Sequence[Tensor]) -> list[Memory]:
        # Through the address: views and arrays of small shares cost more than their bytes.
        return [(ctypes.c_char * part.nbytes).from_address(part.data_ptr()) for part in slices]

    async def send(self, slices: Sequence[Tensor]) -> None:
        """Does nothing: the frame had all bytes."""

    async def receive(self, size: int, payload: memoryview) -> Tensor:
        check_size(size, len(payload), self.frame_bytes)
        return torch.frombuffer(payload, dtype=torch.uint8) if size else torch.empty(0)

    def close(self) -> None:
        """Does nothing: no bytes travel beside the frames."""


class BesideFrame:
    """The bytes go through a process group, announced by the frames."""

    frame_bytes = GROUP_FRAME_BYTES

    def __init__(self, end: GroupEnd, failed: Callable[[str], None]) -> None:
        self.device = end.device
        self._end = end
        self._failed = failed
        self._last: asyncio.Future[None] | None = None

    def payload(self, slices: Sequence[Tensor]) -> list[Memory]:  # noqa: ARG002
        return []

    async def send(self, slices: Sequence[Tensor]) -> None:
        if not slices:
            return
        # One transfer a frame: what the peers agree on for each costs more than a copy. The next
        # frame is announced while these bytes go: the receiver never waits for news.
        flat = [part.view(-1).view(torch.uint8) for part in slices]
        whole = flat[0] if len(flat) == 1 else torch.cat(flat)
        before, self._last = self._last, self._end.send(whole)
        self._last.add_done_callback(self._look_at)
        if before is not None:
            await _carried(before)

    async def receive(self, size: int, payload: memoryview) -> Tensor:
        if payload:
            raise FrameError(f"payload: got {len(payload)} bytes, expected none beside a group")
        check_size(size, size, self.frame_bytes)
        data = torch.empty(size, dtype=torch.uint8, device=self.device)
        if size:
            await _carried(self._end.receive(data))
        return data

    def close(self) -> None:
        self._end.close()

    def _look_at(self, sending: asyncio.Future[None]) -> None:
        if not sending.cancelled() and (error := sending.exception()) is not None:
            self._failed(str(error))


def check_size(announced: int, num_bytes: int, limit: int) -> None:
    """Raises FrameError unless as many bytes came as were announced, and these within the limit."""
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
