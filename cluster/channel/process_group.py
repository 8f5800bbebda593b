"""The bytes of one link through a two-rank `torch.distributed` group of its own.

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
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from twotower.cluster.topology import Transport

GROUP_FRAME_BYTES = 8 << 20
_RECEIVER, _SENDER = 0, 1
_TAG = 0
# These classes are real but not in torch's type hints.
_dist: Any = torch.distributed


class GroupEnd:
    """One end of a link's group: sends or receives in the order of the calls, in one thread.

    NCCL takes device tensors, in the order of the device's default stream; it has not been run yet.
    """

    def __init__(
        self, group: Any, peer: int, executor: ThreadPoolExecutor, device: torch.device
    ) -> None:
        self.group = group
        self._peer = peer
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
        # Only the end of the last reference closes the group's sockets.
        self.group = None
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _start(self, verb: str, tensor: Tensor) -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._executor, self._exchange, verb, tensor)

    def _exchange(self, verb: str, tensor: Tensor) -> None:
        group = self.group
        if group is None:
            raise RuntimeError("the group is closed")
        getattr(group, verb)([tensor], self._peer, _TAG).wait()
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()


class Rendezvous:
    """The receiver's store, where one sender may join it; close it in any case."""

    def __init__(self, host: str) -> None:
        self._host = host.strip("[]")
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        # A socket of our own: by itself the store would listen on every interface.
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
        executor = ThreadPoolExecutor(1, "state-link")
        make = _maker(transport, lambda: store, host, _RECEIVER, timeout_s)
        return await _joined(make, _SENDER, executor, device)

    def close(self) -> None:
        """Closes the store."""
        self._store = None


async def join(
    transport: Transport, host: str, port: int, device: torch.device, timeout_s: float
) -> GroupEnd:
    """The sender's way into the group. Raises RuntimeError if the receiver is not there in time."""
    host = host.strip("[]")

    def store() -> Any:
        limit = timedelta(seconds=timeout_s)
        return _dist.TCPStore(host, port, is_master=False, timeout=limit, wait_for_workers=False)

    executor = ThreadPoolExecutor(1, "state-link")
    make = _maker(transport, store, _own_address(host, port), _SENDER, timeout_s)
    return await _joined(make, _RECEIVER, executor, device)


async def _joined(
    make: Callable[[], Any], peer: int, executor: ThreadPoolExecutor, device: torch.device
) -> GroupEnd:
    try:
        group = await asyncio.get_running_loop().run_in_executor(executor, make)
    except BaseException:
        executor.shutdown(wait=False)
        raise
    return GroupEnd(group, peer, executor, device)


def _maker(
    transport: Transport,
    store: Callable[[], Any],
    own_address: str,
    rank: int,
    timeout_s: float,
) -> Callable[[], Any]:
    def make() -> Any:
        limit = timedelta(seconds=timeout_s)
        if transport == "nccl":
            options = _dist.ProcessGroupNCCL.Options()
            options._timeout = limit
            return _dist.ProcessGroupNCCL(store(), rank, 2, options)
        options = _dist.ProcessGroupGloo._Options()
        options._devices = [_dist.ProcessGroupGloo.create_device(hostname=own_address)]
        options._timeout = limit
        return _dist.ProcessGroupGloo(store(), rank, 2, options)

    return make


def _own_address(host: str, port: int) -> str:
    """The address of this machine that packets to `host` leave from."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return str(probe.getsockname()[0])
