"""Faults put into a link on purpose, for tests and chaos runs of its rows."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import torch
from torch import Tensor

from twotower.cluster.channel.carrier import Carrier
from twotower.cluster.channel.framing import Memory
from twotower.cluster.channel.link_fan import Link
from twotower.cluster.topology import GroupFault, LinkFaults, Transport
from twotower.towers.state.context_state import ContextState
from twotower.towers.state.link import UpdateWriter
from twotower.towers.state.update import UpdatePlan


class FaultyCarrier:
    """A sender's process group with a fault; fulfils `Carrier`."""

    def __init__(self, carrier: Carrier, fault: GroupFault) -> None:
        self.frame_bytes = carrier.frame_bytes
        self.device = carrier.device
        self._carrier = carrier
        self._fault = fault

    def payload(self, slices: Sequence[Tensor]) -> list[Memory]:
        """What goes into the frame itself."""
        return self._carrier.payload(slices)

    async def send(self, slices: Sequence[Tensor]) -> None:
        """Sends other bytes, or none."""
        if self._fault == "corrupt" and slices:
            last = slices[-1].view(-1).view(torch.uint8).clone()
            last[-1] ^= 1
            await self._carrier.send([*slices[:-1], last])

    async def receive(self, size: int, payload: memoryview) -> Tensor:
        """The bytes of a frame."""
        return await self._carrier.receive(size, payload)

    def close(self) -> None:
        """Gives up what is on the way."""
        self._carrier.close()


class FaultyLink:
    """A link with faults; fulfils `Link`."""

    def __init__(self, link: Link, faults: LinkFaults) -> None:
        self.transport: Transport = link.transport
        self._link = link
        self._faults = faults
        self._updates = 0

    def open(self, row_id: str) -> None:
        """Starts to carry a row."""
        self._link.open(row_id)

    def forget(self, row_id: str) -> None:
        """Stops to carry a row."""
        self._link.forget(row_id)

    def begin(self, row_id: str, state: ContextState, plan: UpdatePlan) -> UpdateWriter:
        """Starts the row's next update."""
        return _FaultyWriter(self, self._link.begin(row_id, state, plan))

    def check(self) -> None:
        """Raises UnavailableError once the link is broken."""
        self._link.check()

    async def close(self) -> None:
        """Closes the link below."""
        await self._link.close()

    async def disturb(self) -> None:
        """Delays the update, and cuts the link at the update `cut_at`."""
        if self._faults.delay_s:
            await asyncio.sleep(self._faults.delay_s)
        self._updates += 1
        if self._updates == self._faults.cut_at:
            await self._link.close()


class _FaultyWriter:
    def __init__(self, link: FaultyLink, writer: UpdateWriter) -> None:
        self.takes_shares = writer.takes_shares
        self._link = link
        self._writer = writer

    def put(self, name: str, layer: int, tensor: Tensor) -> None:
        self._writer.put(name, layer, tensor)

    async def finish(self) -> None:
        await self._link.disturb()
        await self._writer.finish()

    def abort(self) -> None:
        self._writer.abort()
