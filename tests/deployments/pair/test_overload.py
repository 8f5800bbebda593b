"""The overload dial, alone and in a pair of three places."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from tests.deployments.pair.test_tower_pair import (
    DIFFUSION,
    PROMPTS,
    TINY,
    closed,
    job,
    linked_towers,
    settled,
)
from twotower import TwoTower
from twotower.cluster.services.tower_services import PairServices
from twotower.deployments.pair.overload import OverloadDial
from twotower.deployments.pair.tower_pair import TowerPair
from twotower.towers.decoding.services import Block

ROWS = 12
FLOORS = replace(
    DIFFUSION,
    max_tokens=16,
    steps_per_block=8,
    confidence_threshold=1.0,
    min_steps_per_block=2,
    min_confidence_threshold=0.5,
)


def test_the_dial_turns_in_quarters_between_its_ends() -> None:
    dial = OverloadDial(4, 12)
    assert [dial.eased(waiting) for waiting in range(15)] == [
        *[0.0] * 5,
        *[0.25] * 2,
        *[0.5] * 3,
        *[0.75] * 2,
        *[1.0] * 3,
    ]
    assert [OverloadDial(0, 1).eased(waiting) for waiting in range(3)] == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("ends", [(3, 3), (4, 3), (-1, 3)])
def test_a_dial_that_cannot_turn(ends: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"ease_from: got {ends[0]}, expected .* which is 3"):
        OverloadDial(*ends)


@pytest.fixture
async def pair() -> AsyncIterator[TowerPair]:
    """Eased from the second waiting row on, at the floors from the fifth."""
    actors = await linked_towers()

    async def start() -> PairServices:
        return PairServices(*actors)

    made = TowerPair(start, dial=OverloadDial(1, 5))
    await made.check_health()
    yield made
    await settled(made)
    await closed(actors)


async def test_rows_that_begin_while_others_wait_are_eased_and_say_so(pair: TowerPair) -> None:
    """Each gives what its request gives alone with the steps and threshold that were used."""

    async def blocks_of(row: int) -> list[Block]:
        params = replace(FLOORS, seed=row)
        if row % 4 == 3:
            params = replace(params, min_steps_per_block=None, min_confidence_threshold=None)
        prompt = PROMPTS[row % len(PROMPTS)]
        return [block async for block in pair.generate(job(row, prompt, params))]

    got = await asyncio.gather(*(blocks_of(row) for row in range(ROWS)))
    shares = [{block.eased for block in blocks} for blocks in got]
    assert all(len(share) == 1 for share in shares)
    eased = [share.pop() for share in shares]
    # They begin in order, with nine behind the first three and with ever fewer.
    assert eased == sorted(eased, reverse=True)
    assert (eased[0], eased[-1]) == (1.0, 0.0)
    model = await asyncio.to_thread(TwoTower.from_pretrained, TINY)
    for row, (blocks, share) in enumerate(zip(got, eased, strict=True)):
        floors = row % 4 != 3
        steps = 8 - round(share * 6) if floors else 8
        alone = await asyncio.to_thread(
            model.generate,
            [PROMPTS[row % len(PROMPTS)]],
            max_tokens=16,
            block_size=8,
            steps_per_block=steps,
            confidence_threshold=1.0 - share * 0.5 if floors else 1.0,
            seed=row,
        )
        assert [token for block in blocks for token in block.token_ids] == alone[0].token_ids
        assert all(block.nfe <= steps for block in blocks)
        if steps == 8:
            # At threshold 1 nothing is ever sure: as asked means all the steps, but for the first
            # token, which is the context tower's.
            assert all(block.nfe == 7 for block in blocks)


async def test_who_gives_up_waiting_does_not_count(pair: TowerPair) -> None:
    long = replace(FLOORS, max_tokens=120)
    streams = [pair.generate(job(row, PROMPTS[0], long)) for row in range(ROWS)]
    tasks = [asyncio.create_task(anext(stream)) for stream in streams]
    await asyncio.wait(tasks[:3])
    for task, stream in zip(tasks, streams, strict=True):
        task.cancel()
        await asyncio.wait([task])
        await stream.aclose()
    await settled(pair)
    after = [block async for block in pair.generate(job(99, PROMPTS[0], FLOORS))]
    assert {block.eased for block in after} == {0.0}
