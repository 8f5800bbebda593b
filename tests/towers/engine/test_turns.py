from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from twotower.towers.engine.options import PassLimits
from twotower.towers.engine.scheduler import BatchLoop
from twotower.towers.engine.turns import Load, Turns, context_is_next, turns_of

LIMITS = PassLimits(4096, 4096)


@pytest.mark.parametrize(
    ("context", "denoiser", "passes", "expected"),
    [
        (Load(0), Load(5), 9, False),
        (Load(1), Load(0), 0, True),
        (Load(3), Load(9), 0, False),
        (Load(3), Load(9), 1, False),
        (Load(4), Load(8), 1, True),
        (Load(1), Load(15), 3, False),
        (Load(1), Load(15), 4, True),
        (Load(1, urgent=True), Load(15), 1, True),
        (Load(1, urgent=True), Load(15), 0, False),
    ],
)
def test_who_is_next(context: Load, denoiser: Load, passes: int, expected: bool) -> None:
    assert context_is_next(context, denoiser, passes) is expected


def test_turns_are_taken_where_passes_would_wait_for_each_other_anyway() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert turns_of(cpu, shared=True, threaded=False) is not None
    assert turns_of(cpu, shared=True, threaded=True) is None
    assert turns_of(cuda, shared=True, threaded=True) is not None
    assert turns_of(cuda, shared=False, threaded=True) is None


class Towers:
    """Two loops over one device, with the sizes of their passes in order."""

    def __init__(self, *, threaded: bool) -> None:
        self.passes: list[tuple[str, int]] = []
        self.running = self.most_running = 0
        turns = Turns()
        pools = [ThreadPoolExecutor(1) if threaded else None for _ in range(2)]
        self.denoiser = BatchLoop(self._pass_of("denoiser"), LIMITS, pools[0], turns.denoiser)
        self.context = BatchLoop(self._pass_of("context"), LIMITS, pools[1], turns.context)

    def rows_of(self, tower: str) -> list[int]:
        return [rows for name, rows in self.passes if name == tower]

    def _pass_of(self, tower: str):  # type: ignore[no-untyped-def]
        def run(works: Sequence[int]) -> Sequence[int]:
            self.running += 1
            self.most_running = max(self.most_running, self.running)
            time.sleep(0.0005)
            self.passes.append((tower, len(works)))
            self.running -= 1
            return works

        return run

    async def decode(self, steps: Sequence[int]) -> None:
        """A row of so many denoiser passes in each of its blocks."""
        for count in steps:
            for step in range(count):
                await self.denoiser.submit(step, 16, begun=step > 0)
            # As in the engines: a result passes through tasks of its own on its way.
            await asyncio.ensure_future(asyncio.sleep(0))
            await asyncio.ensure_future(self.context.submit(0, 16, patient=True))


@pytest.mark.parametrize("threaded", [False, True])
async def test_extensions_wait_for_one_another_and_the_denoiser_for_them(threaded: bool) -> None:
    towers = Towers(threaded=threaded)
    rows = [[3 + (7 * row + 5 * block) % 6 for block in range(12)] for row in range(16)]
    await asyncio.gather(*(towers.decode(steps) for steps in rows))
    assert towers.most_running == 1
    denoiser, context = towers.rows_of("denoiser"), towers.rows_of("context")
    assert sum(denoiser) == sum(map(sum, rows))
    assert sum(context) == 16 * 12
    # As soon as a row waits it would be about 3 rows an extension.
    steady = context[2:-4]
    assert sum(steady) / len(steady) >= 5
    assert sum(denoiser[:40]) / 40 >= 13


async def test_a_row_alone_waits_for_nobody() -> None:
    towers = Towers(threaded=False)
    await towers.decode([2, 3])
    assert [tower for tower, _ in towers.passes] == [
        *(["denoiser"] * 2),
        "context",
        *(["denoiser"] * 3),
        "context",
    ]


async def test_urgent_work_alternates_with_the_denoiser() -> None:
    towers = Towers(threaded=False)

    async def decode_steps() -> None:
        for step in range(8):
            await towers.context.submit(step, 1)

    async def block() -> None:
        for step in range(8):
            await towers.denoiser.submit(step, 16)

    await asyncio.gather(decode_steps(), block())
    names = [tower for tower, _ in towers.passes]
    assert all(names[i] != names[i + 1] for i in range(14))


async def test_work_that_is_withdrawn_leaves_the_device_to_the_other() -> None:
    towers = Towers(threaded=False)
    held = asyncio.ensure_future(towers.context.submit(0, 16, patient=True))
    block = asyncio.ensure_future(towers.decode([6]))
    held.cancel()
    await asyncio.wait_for(block, 5)
    assert towers.rows_of("context") == [1]
    await asyncio.wait_for(towers.decode([1]), 5)
