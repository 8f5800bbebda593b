"""The loop that joins work of concurrent rows into passes."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from twotower.towers.engine.options import PassLimits
from twotower.towers.engine.scheduler import BatchLoop


class Doubler:
    """Doubles numbers and remembers the passes; a negative number is an error of its own."""

    def __init__(self) -> None:
        self.passes: list[list[int]] = []

    def run(self, works: Sequence[int]) -> list[int | BaseException]:
        self.passes.append(list(works))
        if 666 in works:
            raise RuntimeError("the pass broke")
        return [ValueError(str(work)) if work < 0 else 2 * work for work in works]


async def test_waiting_work_shares_a_pass() -> None:
    doubler = Doubler()
    loop = BatchLoop(doubler.run, PassLimits(100, 64))
    results = await asyncio.gather(*(loop.submit(work, 1) for work in range(10)))
    assert results == [2 * work for work in range(10)]
    assert doubler.passes == [list(range(10))]
    assert (loop.passes, loop.pass_rows, loop.pass_tokens) == (1, 10, 10)
    assert loop.pass_seconds > 0
    assert loop.pending_work == 0


async def test_the_budget_cuts_passes_in_order() -> None:
    doubler = Doubler()
    loop = BatchLoop(doubler.run, PassLimits(10, 64))
    sizes = [4, 4, 4, 11, 1, 9, 1]
    await asyncio.gather(*(loop.submit(i, size) for i, size in enumerate(sizes)))
    # The third waits though a later one would fit; the oversized one runs alone.
    assert doubler.passes == [[0, 1], [2], [3], [4, 5], [6]]


async def test_the_short_run_first_and_every_submitter_has_its_result() -> None:
    doubler = Doubler()
    loop = BatchLoop(doubler.run, PassLimits(100, 64))
    sizes = [16, 1, 16, 2, 1]
    results = await asyncio.gather(*(loop.submit(i, size) for i, size in enumerate(sizes)))
    assert doubler.passes == [[1, 4, 3, 0, 2]]
    assert results == [0, 2, 4, 6, 8]


async def test_rows_that_submit_again_meet_again() -> None:
    doubler = Doubler()
    loop = BatchLoop(doubler.run, PassLimits(100, 64))

    async def row(start: int) -> int:
        value = start
        for _ in range(4):
            value = await loop.submit(value, 1)
        return value

    assert list(await asyncio.gather(row(1), row(2), row(3))) == [16, 32, 48]
    assert [len(works) for works in doubler.passes] == [3, 3, 3, 3]


async def test_an_error_reaches_its_own_submitter_only() -> None:
    loop = BatchLoop(Doubler().run, PassLimits(100, 64))
    results = await asyncio.gather(
        *(loop.submit(work, 1) for work in (1, -5, 2)), return_exceptions=True
    )
    assert results[0] == 2
    assert results[2] == 4
    assert isinstance(results[1], ValueError)


async def test_a_broken_pass_reaches_all_in_it_and_the_loop_goes_on() -> None:
    loop = BatchLoop(Doubler().run, PassLimits(100, 64))
    results = await asyncio.gather(loop.submit(1, 1), loop.submit(666, 1), return_exceptions=True)
    assert [type(result) for result in results] == [RuntimeError, RuntimeError]
    assert [str(result) for result in results] == ["the pass broke"] * 2
    assert results[0] is not results[1]
    assert loop.pass_seconds > 0
    assert await loop.submit(3, 1) == 6


async def test_withdrawn_work_is_never_run() -> None:
    doubler = Doubler()
    loop = BatchLoop(doubler.run, PassLimits(2, 64))
    tasks = [asyncio.ensure_future(loop.submit(work, 1)) for work in range(6)]
    await asyncio.sleep(0)
    for index in (0, 3, 4):
        tasks[index].cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [r for r in results if isinstance(r, int)] == [2, 4, 10]
    assert [work for works in doubler.passes for work in works] == [1, 2, 5]
    assert loop.pending_work == 0


@pytest.mark.parametrize("cancelled", [False, True])
async def test_with_a_thread_the_event_loop_stays_responsive(cancelled: bool) -> None:
    release = asyncio.Event()
    event_loop = asyncio.get_running_loop()

    def run(works: Sequence[int]) -> list[int | BaseException]:
        asyncio.run_coroutine_threadsafe(release.wait(), event_loop).result(timeout=10)
        return [2 * work for work in works]

    with ThreadPoolExecutor(1) as executor:
        loop = BatchLoop(run, PassLimits(10, 64), executor)
        first = asyncio.ensure_future(loop.submit(1, 1))
        second = asyncio.ensure_future(loop.submit(2, 1))
        await asyncio.sleep(0.01)
        assert not first.done()
        if cancelled:
            first.cancel()
        release.set()
        assert await second == 4
        if not cancelled:
            assert await first == 2
    assert loop.pending_work == 0


async def test_a_cancelled_submitter_is_withdrawn_while_a_pass_runs() -> None:
    doubler = Doubler()
    may_end = threading.Event()

    def run(works: Sequence[int]) -> list[int | BaseException]:
        assert may_end.wait(10)
        return doubler.run(works)

    with ThreadPoolExecutor(1) as executor:
        loop = BatchLoop(run, PassLimits(1, 64), executor)
        tasks = [asyncio.ensure_future(loop.submit(work, 1)) for work in range(3)]
        async with asyncio.timeout(10):
            while loop.pending_work != 2:
                await asyncio.sleep(0)
        tasks[1].cancel()
        await asyncio.gather(tasks[1], return_exceptions=True)
        assert loop.pending_work == 1
        may_end.set()
        assert await tasks[0] == 0
        assert await tasks[2] == 4
    assert doubler.passes == [[0], [2]]


async def test_settle_waits_for_the_pass_that_runs() -> None:
    began, may_end = threading.Event(), threading.Event()

    def run(works: Sequence[int]) -> list[int | BaseException]:
        began.set()
        assert may_end.wait(10)
        return list(works)

    with ThreadPoolExecutor(1) as executor:
        loop = BatchLoop(run, PassLimits(512, 64), executor)
        await loop.settle()
        task = asyncio.ensure_future(loop.submit(1, 1))
        assert await asyncio.to_thread(began.wait, 10)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        settling = asyncio.ensure_future(loop.settle())
        await asyncio.sleep(0.05)
        assert not settling.done()
        may_end.set()
        await asyncio.wait_for(settling, 10)


async def test_kinds_of_work_reach_the_scheduler() -> None:
    doubler = Doubler()
    loop = BatchLoop(doubler.run, PassLimits(2, 3))
    await asyncio.gather(
        loop.submit(1, 3, prefill=True),
        loop.submit(2, 1),
        loop.submit(3, 1),
        loop.submit(4, 1, begun=True),
    )
    assert doubler.passes == [[4, 2, 1], [3]]
    assert (loop.pass_tokens, loop.prefill_tokens) == (6, 3)


async def test_the_busy_share_counts_from_the_first_pass() -> None:
    def run(works: Sequence[float]) -> list[float | BaseException]:
        for seconds in works:
            time.sleep(seconds)
        return list(works)

    loop: BatchLoop[float, float] = BatchLoop(run, PassLimits(512, 64))
    assert loop.busy_share(time.monotonic()) == 0.0
    await loop.submit(0.02, 1)
    first, busy = loop.pass_seconds, loop.busy_share(time.monotonic())
    assert first >= 0.02
    assert 0.0 < busy <= 1.0
    await asyncio.sleep(0.1)
    await loop.submit(0.02, 1)
    assert loop.pass_seconds - first >= 0.02
    assert loop.passes == 2
    assert loop.busy_share(time.monotonic()) < busy


def test_it_outlives_its_event_loop() -> None:
    loop = BatchLoop(Doubler().run, PassLimits(10, 64))
    assert asyncio.run(loop.submit(1, 1)) == 2
    assert asyncio.run(loop.submit(2, 1)) == 4
