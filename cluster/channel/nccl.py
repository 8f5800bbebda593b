"""NCCL's member of a link's group: bytes from GPU to GPU, on a separate stream.

Differences from gloo: a transfer is a kernel that spins until the peer's runs, so one whose peer
has gone ends only when the communicator is aborted; messages have no tags and pair by their order;
the first message between two GPUs sets up their connection and waits for the peer without a limit.
Two members on one GPU are refused by NCCL.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal, Protocol

import torch
import torch.distributed
from torch import Tensor

logger = logging.getLogger(__name__)

Verb = Literal["send", "recv"]
RECEIVER, SENDER = 0, 1
TAG = 0
# For what should take a second: a communicator's beginning, its first message, its end.
PATIENCE_S = 60.0
# torch's watchdog ends the whole process when a transfer fails. With this it starts none, and the
# thread that waits for a transfer is told.
_NO_WATCHDOG = "TORCH_NCCL_BLOCKING_WAIT"
_PRESENT = "twotower/present/{}"
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 20e-6, 1e-3
# These classes are real but not in torch's type hints.
_dist: Any = torch.distributed


class Work(Protocol):
    """A transfer that has begun."""

    def is_completed(self) -> bool:
        """True once it has ended, well or not."""

    def wait(self) -> bool:
        """Raises RuntimeError if it has failed."""


class NcclMember:
    """One end of a group of two; make and use it in one thread, `mark` and `leave` anywhere.

    Raises RuntimeError if the peer is not there within `timeout_s`; so does a transfer that takes
    longer.
    """

    def __init__(self, store: Any, rank: int, device: torch.device, timeout_s: float) -> None:
        if not _dist.is_nccl_available():
            raise RuntimeError("this build of torch has no NCCL")
        self._peer = SENDER if rank == RECEIVER else RECEIVER
        self._timeout = timeout_s
        self._left = False
        # Before anything of NCCL, which would wait without end.
        store.set(_PRESENT.format(rank), "1")
        store.wait([_PRESENT.format(self._peer)], timedelta(seconds=timeout_s))
        store.set_timeout(timedelta(seconds=PATIENCE_S))
        os.environ[_NO_WATCHDOG] = "1"
        # Not the default stream: what a pass has queued after the bytes need not end first.
        self._stream = torch.cuda.Stream(device)
        device = self._stream.device
        torch.cuda.set_device(device)
        options = _dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=PATIENCE_S)
        self.group: Any = _dist.ProcessGroupNCCL(store, rank, 2, options)
        greeting = torch.zeros(1, dtype=torch.uint8, device=device)
        verb: Verb = "recv" if rank == RECEIVER else "send"
        self._transfer(verb, greeting, self.mark(), PATIENCE_S)

    def mark(self) -> Any:
        """This point in the caller's stream.

        Before it the bytes to send are computed, and the memory to receive into is no
        longer in use.
        """
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._stream.device))
        return event

    def exchange(self, verb: Verb, tensor: Tensor, mark: Any) -> None:
        """Sends or fills a uint8 tensor; returns when its bytes are there or gone.

        Raises RuntimeError.
        """
        self._transfer(verb, tensor, mark, self._timeout)

    def leave(self) -> None:
        """Aborts the communicator, and with it what is on the way."""
        if not self._left:
            self._left = True
            # An abort waits for the device; the caller is an event loop.
            threading.Thread(target=self._abort, name="state-link-leaves", daemon=True).start()

    def _transfer(self, verb: Verb, tensor: Tensor, mark: Any, timeout_s: float) -> None:
        self._check()
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(mark)
            work: Work = getattr(self.group, verb)([tensor], self._peer, TAG)
            settle(work, self._give_up, timeout_s)
        # An aborted transfer looks like one that has ended well.
        self._check()

    def _give_up(self) -> None:
        # Those that are queued behind it must not meet an aborted communicator.
        self._left = True
        self._abort()

    def _check(self) -> None:
        if self._left:
            raise RuntimeError("the group is closed")

    def _abort(self) -> None:
        try:
            self.group.abort()
        except RuntimeError as error:
            logger.warning("a link's communicator does not end: %s", error)


def settle(work: Work, abort: Callable[[], object], timeout_s: float) -> None:
    """Waits for a transfer on the host, so that its tensor may be used or freed afterwards.

    Raises RuntimeError if it fails, or after `timeout_s`, when it has been aborted.
    """
    # Not `work.wait`: it looks once a millisecond, in which a link carries a hundred megabytes.
    deadline, pause = time.monotonic() + timeout_s, _SHORTEST_PAUSE_S
    while not work.is_completed():
        if time.monotonic() > deadline:
            abort()
            raise RuntimeError(f"Timed out: a transfer took more than {timeout_s:g} s")
        time.sleep(pause)
        pause = min(1.5 * pause, _LONGEST_PAUSE_S)
    work.wait()
