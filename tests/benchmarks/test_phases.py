"""Cancels arrive in the phase that they were meant for, and only there."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

import pytest

from benchmarks.phases import PHASE_OF, PhasedTower, Phases
from benchmarks.soak_requests import Cancel


async def cancelled(
    phases: Phases, cancel: Cancel | None, life: Callable[[], Awaitable[None]]
) -> bool:
    """True if a row that does `life` is cancelled before its end."""

    async def run() -> None:
        await life()

    task = asyncio.create_task(run())
    phases.follow("row", task, cancel)
    async with asyncio.timeout(10):
        await asyncio.wait([task])
    phases.forget("row")
    return task.cancelled()


async def test_a_cancel_arrives_at_the_second_entry() -> None:
    phases, entries = Phases(), 0

    async def life() -> None:
        nonlocal entries
        for _ in range(3):
            with phases.phase("row", "denoising"):
                entries += 1
                await asyncio.sleep(0.05)

    assert await cancelled(phases, Cancel("denoising", 2, 0.0), life)
    assert entries == 2
    assert dict(phases.cancels) == {"denoising": 1}


async def test_a_cancel_that_comes_late_counts_as_between_phases() -> None:
    phases = Phases()

    async def life() -> None:
        with phases.phase("row", "queued"):
            pass
        await asyncio.sleep(5)

    assert await cancelled(phases, Cancel("queued", 1, 0.01), life)
    assert dict(phases.cancels) == {"between": 1}


@pytest.mark.parametrize("cancel", [None, Cancel("transfer", 1, 0.0), Cancel("queued", 2, 0.0)])
async def test_a_row_that_never_gets_there_is_not_cancelled(cancel: Cancel | None) -> None:
    phases = Phases()

    async def life() -> None:
        with phases.phase("row", "queued"):
            await asyncio.sleep(0.01)

    assert not await cancelled(phases, cancel, life)
    assert not phases.cancels


async def test_a_row_that_is_over_takes_no_cancel() -> None:
    phases = Phases()

    async def life() -> None:
        with phases.phase("row", "queued"):
            pass

    assert not await cancelled(phases, Cancel("queued", 1, 0.01), life)
    await asyncio.sleep(0.03)
    assert not phases.cancels
    with phases.phase("row", "queued"):
        pass


async def test_a_tower_s_calls_are_phases_of_their_rows() -> None:
    phases = Phases()

    class Tower:
        """Answers a call with its name and arguments, once its row has slept in it."""

        def __getattr__(self, name: str) -> Callable[..., Awaitable[object]]:
            async def call(*args: object) -> object:
                await asyncio.sleep(0.01 if name == "stats" else 5)
                return name, args

            return call

    tower = PhasedTower(Tower(), phases)
    assert await tower.stats() == ("stats", ())
    for name, phase in PHASE_OF.items():
        call = partial(getattr(tower, name), "row")
        before = phases.cancels[phase]
        assert await cancelled(phases, Cancel(phase, 1, 0.0), call)
        assert phases.cancels[phase] == before + 1
