"""Passes of two towers that share one device, one at a time: which of them is next.

A pass over a few blocks reads nearly as many experts as one over many, so an extension of two rows
beside a denoiser that goes on with fourteen would take almost half of the device's time. Blocks
that wait to be read into the context tower therefore wait for one another, and the denoiser's next
pass waits for the extension in turn, as its rows join it again. Measured on an H200 with rows out
of step: docs/performance.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import torch

# An extension begins once one in so many of the waiting rows waits for it, or after so many passes
# of the denoiser.
ROWS_PER_EXTENSION_ROW = 3
MAX_DENOISER_PASSES = 4
# A pass's results reach their rows, and the rows' next work the other tower, over so many turns of
# the event loop; a decision before would not see them.
_SETTLING_TURNS = 12


@dataclass(frozen=True)
class Load:
    """Rows with work that waits; `urgent` if any of it should not wait for more of its kind."""

    rows: int
    urgent: bool = False


def context_is_next(context: Load, denoiser: Load, denoiser_passes: int) -> bool:
    """True if the context tower's pass comes before the denoiser's, which has run `denoiser_passes`
    passes since the context tower's last one."""
    if not context.rows or not denoiser.rows:
        return context.rows > 0
    if not denoiser_passes:
        return False
    if context.urgent or denoiser_passes >= MAX_DENOISER_PASSES:
        return True
    return ROWS_PER_EXTENSION_ROW * context.rows >= context.rows + denoiser.rows


class Turn:
    """One tower's turns, as an asynchronous context manager around each of its passes."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self.load: Callable[[], Load] = lambda: Load(0)

    def watch(self, load: Callable[[], Load]) -> None:
        """Takes the function that tells what waits."""
        self.load = load

    def changed(self) -> None:
        """Work came or went."""
        self._turns.wake()

    async def __aenter__(self) -> None:
        await self._turns.begin(self)

    async def __aexit__(self, *_: object) -> None:
        await self._turns.end(self)


class Turns:
    """The turns of both towers of a device. All calls belong to one event loop.

    Neither tower waits for one that has no work, and none has two passes while the other has urgent
    work.
    """

    def __init__(self) -> None:
        self.context, self.denoiser = Turn(self), Turn(self)
        self._running = False
        self._denoiser_passes = 0
        self._waiting: list[asyncio.Future[None]] = []

    async def begin(self, turn: Turn) -> None:
        """Waits until `turn` has the device; at once if it has no work any more."""
        while self._running or not self._is_next(turn):
            future = asyncio.get_running_loop().create_future()
            self._waiting.append(future)
            await future
        self._running = True

    async def end(self, turn: Turn) -> None:
        """Gives the device back once the rows have heard of the pass's results."""
        self._denoiser_passes = self._denoiser_passes + 1 if turn is self.denoiser else 0
        try:
            for _ in range(_SETTLING_TURNS):
                await asyncio.sleep(0)
        finally:
            self._running = False
            self.wake()

    def wake(self) -> None:
        """Lets those that wait look again."""
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    def _is_next(self, turn: Turn) -> bool:
        context, denoiser = self.context.load(), self.denoiser.load()
        context_first = context_is_next(context, denoiser, self._denoiser_passes)
        if turn is self.context:
            return context_first or not context.rows
        return not context_first or not denoiser.rows


def turns_of(device: torch.device, *, shared: bool, threaded: bool) -> Turns | None:
    """Turns where both towers' passes would wait for one another anyway: on one GPU, and in one
    thread. Threads on a CPU run side by side."""
    return Turns() if shared and (device.type == "cuda" or not threaded) else None
