"""Rows whose mirrors are brought up to date now and then, over every transport."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.channel import NCCL, TRANSPORTS, Channel
from tests.support.lazy_rows import CAPACITY, CONFIG, LazyRow, ar_tokens, assert_mirrored
from tests.support.random_model import write_checkpoint
from tests.support.rows import OPTIONS, Pair, Towers
from twotower.cluster.channel.link_fan import LinkFan
from twotower.towers.checkpoint.weights import load_context_tower, load_denoiser_tower
from twotower.towers.engine.context_engine import ContextEngine
from twotower.towers.engine.denoiser_engine import DenoiserEngine
from twotower.towers.state.update import UpdateKind, most_delta_tokens

MOST = most_delta_tokens(CONFIG)


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Towers:
    folder: Path = write_checkpoint(tmp_path_factory.mktemp("lazy"), CONFIG)
    return load_context_tower(folder), load_denoiser_tower(folder)


@pytest.fixture(scope="module")
def own(towers: Towers) -> list[int]:
    """The tokens of every row here."""
    return asyncio.run(ar_tokens(ContextEngine(towers[0], None, OPTIONS)))


class Joined:
    """Both engines with a channel between them; `rejoin` puts a new `link` in place."""

    def __init__(self, towers: Towers, transport: str) -> None:
        pool = OPTIONS.pool_for(towers[1])
        self.pair = Pair(
            ContextEngine(towers[0], LinkFan(), OPTIONS),
            DenoiserEngine(towers[1], OPTIONS, pool=pool),
        )
        self.channel = Channel(transport, self.pair.denoiser)
        self.link: Any = None
        self._weights = towers[0].replay_tensors()
        self._epoch = 0

    @property
    def fan(self) -> LinkFan:
        fan = self.pair.context.link
        assert isinstance(fan, LinkFan)
        return fan

    async def rejoin(self) -> None:
        self._epoch += 1
        self.link = self.channel.link(epoch=self._epoch, weights=self._weights, config=CONFIG)
        if self.channel.transport == "in_process":
            # Nothing breaks there: no fan stands between.
            self.pair.context.link = self.link
        else:
            await self.fan.connect(0, self.link)

    async def start(self, row_id: str, own: list[int], seed: int) -> LazyRow:
        await self.open(row_id)
        return await LazyRow.start(self.pair.context, row_id, own, seed)

    async def open(self, row_id: str) -> None:
        """Opens a row's mirror, anew if there was one."""
        await self.pair.denoiser.release(row_id)
        await self.pair.denoiser.open(row_id, CAPACITY)
        self.channel.open(row_id)

    async def end(self, *rows: LazyRow) -> None:
        for row in rows:
            if self.channel.receiver is not None:
                self.channel.receiver.forget(row.row_id)
            await self.pair.denoiser.release(row.row_id)
            await self.pair.context.release(row.row_id)
        self.pair.assert_empty()
        if self.channel.receiver is not None:
            assert self.channel.receiver.num_rows == 0


@pytest.fixture(params=[*TRANSPORTS, NCCL])
async def joined(towers: Towers, request: pytest.FixtureRequest) -> AsyncIterator[Joined]:
    made = Joined(towers, request.param)
    await made.channel.start()
    await made.rejoin()
    yield made
    async with asyncio.timeout(20):
        await made.channel.close()


async def test_rows_stand_where_their_senders_do_after_one_update_each(
    joined: Joined, own: list[int]
) -> None:
    rows = [await joined.start(f"row-{seed}", own, seed) for seed in range(3)]
    for tokens in (4, 17, MOST + 1, 1):
        await asyncio.gather(*(row.advance(tokens) for row in rows))
        await asyncio.gather(*(joined.pair.context.update_mirror(row.row_id) for row in rows))
        for row in rows:
            assert_mirrored(row, joined.pair.denoiser)
    await joined.end(*rows)


async def test_a_row_among_others_that_are_sent_more_often(joined: Joined, own: list[int]) -> None:
    often, once = await joined.start("often", own, 1), await joined.start("once", own, 2)
    update = joined.pair.context.update_mirror

    async def rounds(row: LazyRow) -> None:
        for _ in range(6):
            await row.verify(5)
            if row is often:
                await update(row.row_id)

    await update("once")
    await asyncio.gather(rounds(often), rounds(once))
    await update("once")
    for row in (often, once):
        assert_mirrored(row, joined.pair.denoiser)
    await joined.end(often, once)


@pytest.mark.parametrize("lost", ["the first update", "a later one", "between updates"])
async def test_a_row_whose_update_was_lost_is_sent_whole_once_it_has_moved(
    joined: Joined, own: list[int], lost: str
) -> None:
    if joined.channel.transport == "in_process":
        pytest.skip("in one process there is no link that breaks")
    pair, row = joined.pair, await joined.start("row", own, 0)
    kinds: list[UpdateKind] = []
    receive = pair.denoiser.receive

    def noted(row_id: str, update: Any) -> None:
        kinds.append(update.plan.kind)
        receive(row_id, update)

    joined.channel.receiver._mirrors._apply = noted  # type: ignore[union-attr]
    if lost != "the first update":
        await pair.context.update_mirror("row")
        await row.verify(3)
    await joined.link.close()
    await row.verify(2)
    if lost != "between updates":
        # The row itself goes on; its denoiser's call finds out that the mirror is not there.
        await pair.context.update_mirror("row")
    await joined.rejoin()
    await row.verify(2)
    # Still lost: nothing may be sent over the new link before the mirror is a new one.
    await pair.context.update_mirror("row")
    assert kinds == ["snapshot"][: int(lost != "the first update")]
    kinds.clear()
    await joined.open("row")
    await pair.context.reseed("row", lambda: joined.fan.move("row", 0))
    assert_mirrored(row, pair.denoiser)
    await row.verify(4)
    await pair.context.update_mirror("row")
    assert_mirrored(row, pair.denoiser)
    assert kinds == ["snapshot", "delta"]
    await joined.end(row)
