"""Mirrors of rows that may be drafted without the denoiser: brought up to date when asked for."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from tests.support.lazy_rows import (
    CAPACITY,
    CONFIG,
    PARAMS,
    PROMPT,
    LazyRow,
    ar_tokens,
    assert_mirrored,
)
from tests.support.random_model import write_checkpoint
from tests.support.rows import OPTIONS, Pair, Towers, params_of, tokens_of
from twotower.towers.checkpoint.weights import load_context_tower, load_denoiser_tower
from twotower.towers.engine.context_engine import ContextEngine
from twotower.towers.engine.denoiser_engine import DenoiserEngine
from twotower.towers.engine.local_link import LocalLink
from twotower.towers.errors import UnavailableError
from twotower.towers.state.update import StateUpdate, UpdatePlan, most_delta_tokens

MOST = most_delta_tokens(CONFIG)


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Towers:
    folder = write_checkpoint(tmp_path_factory.mktemp("lazy"), CONFIG)
    return load_context_tower(folder), load_denoiser_tower(folder)


@pytest.fixture(scope="module")
def own(towers: Towers) -> list[int]:
    """The tokens of every row here."""
    return asyncio.run(ar_tokens(ContextEngine(towers[0], None, OPTIONS)))


class Mirrored(Pair):
    """A pair whose denoiser has mirrors of its own; `updates` are those that have come."""

    updates: list[StateUpdate]

    @classmethod
    def build(cls, towers: Towers, *, device_steps: bool = False, shared: bool = False) -> Mirrored:
        pool = None if shared else OPTIONS.pool_for(towers[1])
        denoiser = DenoiserEngine(towers[1], OPTIONS, pool=pool)
        link = LocalLink(towers[0], denoiser, shared)
        context = ContextEngine(towers[0], link, OPTIONS, device_steps=device_steps)
        made = cls(context, denoiser)
        updates: list[StateUpdate] = []
        receive = denoiser.receive

        def noted(row_id: str, update: StateUpdate) -> None:
            updates.append(update)
            receive(row_id, update)

        object.__setattr__(made, "updates", updates)
        object.__setattr__(denoiser, "receive", noted)
        return made

    @property
    def plans(self) -> list[UpdatePlan]:
        return [update.plan for update in self.updates]

    async def start(self, own: Sequence[int], row_id: str = "row", seed: int = 0) -> LazyRow:
        await self.denoiser.open(row_id, CAPACITY)
        return await LazyRow.start(self.context, row_id, own, seed)

    async def end(self, *rows: LazyRow) -> None:
        for row in rows:
            await self.denoiser.release(row.row_id)
            await self.context.release(row.row_id)
        self.assert_empty()


@pytest.mark.parametrize("device_steps", [False, True])
async def test_one_update_brings_the_senders_bits_after_any_rounds(
    towers: Towers, own: list[int], device_steps: bool
) -> None:
    pair = Mirrored.build(towers, device_steps=device_steps)
    rows = [await pair.start(own, f"row-{seed}", seed) for seed in range(3)]
    assert pair.updates == []
    position = len(PROMPT)
    for number, tokens in enumerate((2, 1, 7, 20, MOST + 1, 3)):
        await asyncio.gather(*(row.advance(tokens) for row in rows))
        assert pair.updates == []
        await asyncio.gather(*(pair.context.update_mirror(row.row_id) for row in rows))
        start, position = position if number else 0, position + tokens
        kind: Any = "snapshot" if number == 0 or tokens > MOST else "delta"
        assert pair.plans == [UpdatePlan(kind, start, position)] * 3
        for row in rows:
            assert_mirrored(row, pair.denoiser)
        pair.updates.clear()
        # It stands there already.
        await pair.context.update_mirror("row-0")
        assert pair.updates == []
    await pair.end(*rows)


async def test_one_delta_has_the_bytes_of_its_tokens(towers: Towers, own: list[int]) -> None:
    """No more than the updates of single rounds; and less than a snapshot."""
    pair = Mirrored.build(towers)
    often, once = await pair.start(own, "often"), await pair.start(own, "once")
    for row in (often, once):
        await pair.context.update_mirror(row.row_id)
    pair.updates.clear()
    for accepted in (3, 8, 5, 8):
        await often.verify(accepted)
        await pair.context.update_mirror("often")
        await once.verify(accepted)
    separate = [update.num_bytes for update in pair.updates]
    await pair.context.update_mirror("once")
    (single,) = pair.updates[4:]
    assert single.plan == UpdatePlan("delta", 5, 29)
    # In fp32: the projections of 2 Mamba layers and K and V of 2 attention layers with 2 heads.
    token = 4 * (2 * (CONFIG.conv_dim + CONFIG.mamba_num_heads) + 2 * 2 * 2 * CONFIG.head_dim)
    assert single.num_bytes == 24 * token == sum(separate)
    await pair.end(often, once)


async def test_a_row_that_never_drafts_keeps_no_log(towers: Towers, own: list[int]) -> None:
    pair = Mirrored.build(towers)
    row = await pair.start(own)
    empty = row.state.num_bytes
    for accepted in (3, 8):
        await row.verify(accepted)
        assert row.state.num_bytes == empty
    await row.step()
    assert row.state.num_bytes == empty
    assert pair.updates == []
    await pair.end(row)


async def test_a_log_that_is_too_long_is_dropped(towers: Towers, own: list[int]) -> None:
    pair = Mirrored.build(towers)
    row = await pair.start(own)
    empty = row.state.num_bytes
    await pair.context.update_mirror("row")
    token = 4 * 2 * (CONFIG.conv_dim + CONFIG.mamba_num_heads)
    await row.verify(8)
    assert row.state.num_bytes == empty + 8 * token
    while row.state.position - len(PROMPT) <= MOST:
        assert row.state.num_bytes <= empty + MOST * token < empty + pair.context.pool.slot_bytes
        await row.verify(8)
    assert row.state.num_bytes == empty
    await pair.context.update_mirror("row")
    assert pair.plans[1] == UpdatePlan("snapshot", 5, 45)
    assert_mirrored(row, pair.denoiser)
    await pair.end(row)


async def test_a_shared_state_is_read_where_it_is(towers: Towers, own: list[int]) -> None:
    """Without copies; the denoiser is only told."""
    pair = Mirrored.build(towers, shared=True)
    row = await pair.start(own)
    reader, empty = pair.denoiser._rows["row"], row.state.num_bytes
    assert reader.state is None
    for accepted in (3, 8):
        await pair.context.update_mirror("row")
        assert reader.state is row.state
        assert row.mirrored == row.state.position
        await row.verify(accepted)
        await row.step()
        assert row.state.num_bytes == empty
    await pair.end(row)


@pytest.mark.parametrize("held", ["nothing", "a snapshot"])
async def test_after_a_lost_update_no_delta_is_sent(
    towers: Towers, own: list[int], held: str
) -> None:
    pair = Mirrored.build(towers)
    row = await pair.start(own)
    receive = pair.denoiser.receive
    if held == "a snapshot":
        await pair.context.update_mirror("row")
        await row.verify(3)

    def lose(_row_id: str, _update: StateUpdate) -> None:
        raise ValueError("lost")

    object.__setattr__(pair.denoiser, "receive", lose)
    with pytest.raises(UnavailableError, match="refused"):
        await pair.context.update_mirror("row")
    object.__setattr__(pair.denoiser, "receive", receive)
    await row.verify(2)
    pair.updates.clear()
    if held == "nothing":
        await pair.context.update_mirror("row")
        assert_mirrored(row, pair.denoiser)
    else:
        # A mirror that has something takes no state from the beginning: the row has to move.
        with pytest.raises(UnavailableError, match="refused"):
            await pair.context.update_mirror("row")
    assert pair.plans == [UpdatePlan("snapshot", 0, row.state.position)]
    await pair.end(row)


@pytest.mark.parametrize("updated", [False, True])
async def test_a_moved_row_goes_on_from_what_was_sent_whole(
    towers: Towers, own: list[int], updated: bool
) -> None:
    pair = Mirrored.build(towers)
    row = await pair.start(own)
    if updated:
        await pair.context.update_mirror("row")
    await row.verify(4)
    await pair.denoiser.release("row")
    await pair.denoiser.open("row", CAPACITY)
    pair.updates.clear()
    await pair.context.reseed("row", lambda: None)
    assert pair.plans == [UpdatePlan("snapshot", 0, 9)]
    assert_mirrored(row, pair.denoiser)
    await pair.context.update_mirror("row")
    assert len(pair.updates) == 1
    await row.verify(4)
    await pair.context.update_mirror("row")
    assert pair.plans[1:] == [UpdatePlan("delta", 9, 13)]
    assert_mirrored(row, pair.denoiser)
    await pair.end(row)


async def test_a_tower_without_a_denoiser_has_no_mirror_to_update(
    towers: Towers, own: list[int]
) -> None:
    context = ContextEngine(towers[0], None, OPTIONS)
    row = await LazyRow.start(context, "row", own)
    empty = row.state.num_bytes
    await context.update_mirror("row")
    await row.advance(12)
    await context.update_mirror("row")
    assert (row.mirrored, row.state.num_bytes) == (0, empty)
    await context.release("row")
    with pytest.raises(UnavailableError, match="released"):
        await context.update_mirror("row")


@pytest.mark.parametrize("device_steps", [False, True])
@pytest.mark.parametrize(
    "params",
    [replace(PARAMS, max_tokens=45), params_of("auto", max_tokens=45, block_size=8)],
    ids=["any", "auto"],
)
async def test_rows_with_lazy_mirrors_have_the_tokens_of_ar(
    towers: Towers, params: Any, device_steps: bool
) -> None:
    pair = Mirrored.build(towers, device_steps=device_steps)
    blocks = await pair.blocks("row", PROMPT, params)
    assert tokens_of(blocks) == await ar_tokens(pair.context, params)
    # One joins the other, and there is none without a draft.
    starts, ends = [plan.start for plan in pair.plans], [plan.position for plan in pair.plans]
    assert starts == [0, *ends[:-1]]
    assert len(pair.plans) <= sum(block.nfe > 0 for block in blocks)
    pair.assert_empty()


async def test_rounds_without_the_denoiser_send_nothing(towers: Towers) -> None:
    """Where it is not to be had, and where lookups are enough: the output is one token again and
    again."""
    pair = Mirrored.build(towers)
    for source in ("lookup", "any"):
        params = replace(PARAMS, max_tokens=60, draft_source=source, logit_bias=((4, 90.0),))
        blocks = await pair.blocks("row", PROMPT, params)
        assert set(tokens_of(blocks)) == {4}
        assert sum(block.lookup_accepted_tokens for block in blocks) > 30
        passes = sum(block.nfe for block in blocks)
        assert pair.denoiser.stats().passes == passes
        assert len(pair.plans) <= passes <= (0 if source == "lookup" else 2)
    pair.assert_empty()


@pytest.mark.parametrize("mode", ["mask_diffusion", "mock_ar", "verified"])
async def test_rows_that_need_the_denoiser_are_mirrored_at_once(towers: Towers, mode: str) -> None:
    pair = Mirrored.build(towers)
    params = params_of(mode, max_tokens=16, block_size=8, draft_source="denoiser")
    await pair.denoiser.open("row", CAPACITY)
    await pair.context.open("row", CAPACITY)
    await pair.context.prefill("row", PROMPT, [], params)
    row = LazyRow(pair.context, "row", [], random.Random(0))
    assert_mirrored(row, pair.denoiser)
    pair.updates.clear()
    await pair.context.update_mirror("row")
    assert pair.updates == []
    await pair.end(row)
