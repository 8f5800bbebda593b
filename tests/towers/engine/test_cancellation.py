"""A row that is cancelled in any phase leaves no slot, page or place in a queue behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.support.rows import OPTIONS, Pair, Towers, tokens_of
from twotower.towers.decoding.generation import generate_blocks
from twotower.towers.engine.local_link import LocalLink
from twotower.towers.errors import CapacityError
from twotower.towers.request.params import GenerationParams
from twotower.towers.state.context_state import ContextState
from twotower.towers.state.link import UpdateWriter
from twotower.towers.state.update import UpdatePlan

PROMPT = [5, 3, 17, 3, 9] * 30
PARAMS = GenerationParams(max_tokens=24, block_size=8, seed=7)
WAIT_S = 60.0


class Gate:
    """Holds a call of a tower's pass thread once the `after`-th one has come."""

    def __init__(self, call: Callable[..., Any], after: int) -> None:
        self.call, self.after, self.calls = call, after, 0
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.after:
            self.reached.set()
            assert self.opened.wait(WAIT_S)
        return self.call(*args, **kwargs)


async def reached(event: threading.Event) -> None:
    async with asyncio.timeout(WAIT_S):
        while not event.is_set():
            await asyncio.sleep(0.002)


class WireLink(LocalLink):
    """Holds the `after`-th update on its way."""

    def __init__(self, pair: Pair, after: int) -> None:
        super().__init__(pair.context.tower, pair.denoiser, shared=False)
        self.after, self.begun, self.arrive = after, 0, asyncio.Event()
        self.on_wire = asyncio.Event()

    def begin(self, row_id: str, state: ContextState, plan: UpdatePlan) -> UpdateWriter:
        self.begun += 1
        writer = super().begin(row_id, state, plan)
        if self.begun != self.after:
            return writer
        finish = writer.finish

        async def held() -> None:
            self.on_wire.set()
            await self.arrive.wait()
            await finish()

        writer.finish = held  # type: ignore[method-assign]
        return writer


async def cancel(task: asyncio.Future[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize(
    ("tower", "after"),
    [
        ("context", 1),
        ("context", 2),
        ("context", 3),
        ("context", 4),
        ("denoiser", 1),
        ("denoiser", 9),
    ],
    ids=["first chunk", "second chunk", "last chunk", "extension", "first step", "second block"],
)
@pytest.mark.parametrize("shared", [True, False])
def test_in_a_pass(
    towers: Towers, monkeypatch: pytest.MonkeyPatch, tower: str, after: int, shared: bool
) -> None:
    pair = Pair.of(*towers, shared=shared, threaded=True)
    held, name = (
        (pair.context.tower, "read") if tower == "context" else (pair.denoiser.tower, "forward")
    )
    gate = Gate(getattr(held, name), after)
    monkeypatch.setattr(held, name, gate)

    async def run() -> None:
        task = asyncio.ensure_future(pair.blocks("row", PROMPT, PARAMS))
        await reached(gate.reached)
        task.cancel()
        await asyncio.sleep(0.01)
        # The pass still reads and writes the row's state: nothing may be given back yet.
        owner = pair.denoiser if tower == "denoiser" and not shared else pair.context
        assert owner.stats().slots_used == 1
        gate.opened.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        pair.assert_empty()

    asyncio.run(asyncio.wait_for(run(), WAIT_S))


@pytest.mark.parametrize("after", [1, 2, 3, 4], ids=["kv", "more kv", "snapshot", "delta"])
def test_while_an_update_is_on_the_wire(towers: Towers, after: int) -> None:
    pair = Pair.of(*towers, shared=False, threaded=True)

    async def run() -> None:
        link = pair.context.link = WireLink(pair, after)
        task = asyncio.ensure_future(pair.blocks("row", PROMPT, PARAMS))
        async with asyncio.timeout(WAIT_S):
            await link.on_wire.wait()
        await cancel(task)
        link.arrive.set()
        await asyncio.sleep(0.01)
        pair.assert_empty()
        blocks = await pair.blocks("next", PROMPT, PARAMS)
        assert len(tokens_of(blocks)) == 24

    asyncio.run(asyncio.wait_for(run(), WAIT_S))


@pytest.mark.parametrize("shared", [True, False])
def test_in_the_queue(towers: Towers, monkeypatch: pytest.MonkeyPatch, shared: bool) -> None:
    options = replace(OPTIONS, max_num_seqs=1, max_context=256, max_queued_requests=2)
    pair = Pair.of(*towers, shared=shared, options=options, threaded=True)
    # The row that has the only slot stays where it is until the queue has been looked at.
    gate = Gate(pair.context.tower.read, 1)
    monkeypatch.setattr(pair.context.tower, "read", gate)

    async def run() -> None:
        first, second, third = (
            asyncio.ensure_future(pair.blocks(name, PROMPT, PARAMS)) for name in ("a", "b", "c")
        )
        await reached(gate.reached)
        assert pair.context.stats().queued_rows == 2
        with pytest.raises(CapacityError, match="2"):
            await pair.blocks("d", PROMPT, PARAMS)
        await cancel(second)
        assert pair.context.stats().queued_rows == 1
        gate.opened.set()
        rows = await asyncio.gather(first, third)
        assert tokens_of(rows[0]) == tokens_of(rows[1])
        pair.assert_empty()

    asyncio.run(asyncio.wait_for(run(), WAIT_S))


def test_between_a_block_and_its_extension(towers: Towers) -> None:
    """The consumer stops while it holds a block: the extension has been asked for just before."""
    pair = Pair.of(*towers, shared=False, threaded=True)

    async def run() -> None:
        rows = generate_blocks(pair.context, pair.denoiser, "row", PROMPT, PARAMS)
        await anext(rows)
        await rows.aclose()
        pair.assert_empty()

    asyncio.run(asyncio.wait_for(run(), WAIT_S))
