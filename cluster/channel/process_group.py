"""The bytes of one link through a two-rank `torch.distributed` group.

The group is made directly, not by `init_process_group`, so that one process may hold many links.
Its two members meet at a store that the receiver opens for this link alone.
What goes through the group, and in which order, the control stream's frames say.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor

from twotower.cluster.channel.nccl import RECEIVER, SENDER, TAG, NcclMember, Verb
from twotower.cluster.topology import Transport

GROUP_FRAME_BYTES = 8 << 20
# These classes are real but not in torch's type hints.
_dist: Any = torch.distributed


class _Member(Protocol):
    """One member of a link's group. `exchange` runs in one thread, the others in the loop's."""

    group: Any

    def mark(self) -> Any:
        """A mark of the work that must end before a transfer that starts now; for `exchange`."""

    def exchange(self, verb: Verb, tensor: Tensor, mark: Any) -> None:
        """Sends or fills a uint8 tensor and returns when that is done. Raises RuntimeError."""

    def leave(self) -> None:
        """Gives up the group and what is on the way."""


class GroupEnd:
    """One end of a link's group: sends or receives in the order of the calls, in one thread."""

    def __init__(self, member: _Member, executor: ThreadPoolExecutor, device: torch.device) -> None:
        self.member = member
        self._executor = executor
        self.device = device

    def send(self, tensor: Tensor) -> asyncio.Future[None]:
        """Starts to send a uint8 tensor; it stays as it is until the result is there."""
        return self._start("send", tensor)

    def receive(self, tensor: Tensor) -> asyncio.Future[None]:
        """Starts to fill a uint8 tensor."""
        return self._start("recv", tensor)

    def close(self) -> None:
        """Leaves the group: the peer's pending calls fail, those here end within the timeout."""
        self.member.leave()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _start(self, verb: Verb, tensor: Tensor) -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        member = self.member
        return loop.run_in_executor(self._executor, member.exchange, verb, tensor, member.mark())


class _GlooMember:
    """Gloo's member: bytes in the host's memory, over TCP from `own_address`.

    Raises RuntimeError if the peer is not there within `timeout_s`; so does a transfer that takes
    longer.
    """

    def __init__(self, store: Any, rank: int, own_address: str, timeout_s: float) -> None:
        self._peer = SENDER if rank == RECEIVER else RECEIVER
        options = _dist.ProcessGroupGloo._Options()
        options._devices = [_dist.ProcessGroupGloo.create_device(hostname=own_address)]
        options._timeout = timedelta(seconds=timeout_s)
        self.group: Any = _dist.ProcessGroupGloo(store, rank, 2, options)

    def mark(self) -> Any:
        """None: bytes in the host's memory are there."""
        return None

    def exchange(self, verb: Verb, tensor: Tensor, mark: Any) -> None:  # noqa: ARG002
        group = self.group
        if group is None:
            raise RuntimeError("the group is closed")
        getattr(group, verb)([tensor], self._peer, TAG).wait()

    def leave(self) -> None:
        # Only the end of the last reference closes the group's sockets.
        self.group = None


class Rendezvous:
    """The receiver's store, where one sender may join it; close it in any case."""

    def __init__(self, host: str) -> None:
        self._host = host.strip("[]")
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        # Given a socket, as the store itself would listen on every interface.
        with socket.create_server((self._host, 0), family=family) as listener:
            self.port: int = listener.getsockname()[1]
            self._store: Any = _dist.TCPStore(
                self._host,
                self.port,
                is_master=True,
                wait_for_workers=False,
                master_listen_fd=listener.detach(),
            )

    async def accept(
        self, transport: Transport, device: torch.device, timeout_s: float
    ) -> GroupEnd:
        """Waits for the sender. Raises RuntimeError if it does not come in time."""
        store, host = self._store, self._host

        def make() -> _Member:
            return _member(transport, store, RECEIVER, host, device, timeout_s)

        return await _joined(make, device)

    def close(self) -> None:
        """Closes the store."""
        self._store = None


async def join(
    transport: Transport, host: str, port: int, device: torch.device, timeout_s: float
) -> GroupEnd:
    """The sender's way into the group. Raises RuntimeError if the receiver is not there in time."""
    host = host.strip("[]")

    def make() -> _Member:
        limit = timedelta(seconds=timeout_s)
        store = _dist.TCPStore(host, port, is_master=False, timeout=limit, wait_for_workers=False)
        address = _own_address(host, port)
        return _member(transport, store, SENDER, address, device, timeout_s)

    return await _joined(make, device)


async def _joined(make: Callable[[], _Member], device: torch.device) -> GroupEnd:
    executor = ThreadPoolExecutor(1, "state-link")
    try:
        member = await asyncio.get_running_loop().run_in_executor(executor, make)
    except BaseException:
        executor.shutdown(wait=False)
        raise
    return GroupEnd(member, executor, device)


def _member(
    transport: Transport,
    store: Any,
    rank: int,
    own_address: str,
    device: torch.device,
    timeout_s: float,
) -> _Member:
    if transport == "nccl":
        return NcclMember(store, rank, device, timeout_s)
    return _GlooMember(store, rank, own_address, timeout_s)


def _own_address(host: str, port: int) -> str:
    """The address of this machine that packets to `host` leave from."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return str(probe.getsockname()[0])
