"""Rows outlive their denoiser towers: the real actors' classes and links, without Ray."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace

import pytest

from tests.conftest import GOLDEN
from twotower import TwoTower
from twotower.cluster.channel.grpc import LinkSpec
from twotower.cluster.services.actors import ContextTowerActor, DenoiserTowerActor
from twotower.cluster.services.pair_towers import MOST_REPAIRS, PairTowers
from twotower.cluster.services.tower_services import Call, DenoiserTowerService, P, T, bound
from twotower.cluster.topology import PairTopology
from twotower.towers.decoding.generation import generate_blocks
from twotower.towers.decoding.services import Block, ProvisionalBlock
from twotower.towers.engine.options import EngineOptions
from twotower.towers.errors import UnavailableError
from twotower.towers.request.params import GenerationParams

TINY = GOLDEN / "tiny_a"
TOPOLOGY = PairTopology(
    model_path=str(TINY),
    device="cpu",
    dtype="float32",
    engine=EngineOptions(max_num_seqs=16, max_context=256, prefix_cache_mib=0),
    cpus_per_tower=0.4,
    gpus_per_tower=0.0,
    num_threads=1,
)
BASE = GenerationParams(max_tokens=40, block_size=8, confidence_threshold=0.3, seed=5)
MODES = (
    BASE,
    replace(BASE, temperature=1.0),
    replace(BASE, mode="verified", temperature=1.0, max_tokens=20),
    replace(BASE, mode="mock_ar", max_tokens=6),
    replace(BASE, mode="ar", max_tokens=12),
    replace(BASE, mode="auto", max_tokens=20),
)
PROMPTS = ([5, 6, 7, 8], list(range(10, 90)), [3, 4], [9])
ROWS = [(PROMPTS[i % 4], replace(MODES[i % 6], seed=i)) for i in range(12)]


class Tower(DenoiserTowerService):
    """A denoiser tower's actor that can die, and hang, as a remote one does."""

    def __init__(self) -> None:
        self.actor = DenoiserTowerActor(TOPOLOGY)
        self.dead = asyncio.Event()
        self.hung = False

    async def _call(self, call: Call[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        if self.dead.is_set():
            raise UnavailableError("the actor is gone")
        work = asyncio.ensure_future(self._answer(call, *args, **kwargs))
        dying = asyncio.ensure_future(self.dead.wait())
        try:
            await asyncio.wait([work, dying], return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            raise UnavailableError("the actor is gone")
        finally:
            work.cancel()
            dying.cancel()

    async def _answer(self, call: Call[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        if self.hung:
            await asyncio.Event().wait()
        return await bound(self.actor, call)(*args, **kwargs)

    async def kill(self) -> None:
        self.dead.set()
        await self.actor.close()


class Keeper:
    """Starts towers in this process."""

    def __init__(self, context: ContextTowerActor) -> None:
        self.context = context
        self.towers: dict[int, Tower] = {}
        self.started = 0
        self.relinked = 0
        self.fails = False
        self._links: dict[int, LinkSpec] = {}
        self._epoch = 0

    async def start(self, index: int) -> Tower:
        if self.fails:
            raise UnavailableError("no room for another")
        if index in self.towers:
            await self.towers[index].kill()
        tower = self.towers[index] = Tower()
        self.started += 1
        await tower.actor.load()
        self._links[index] = await tower.actor.listen("secret")
        await self._link(index)
        return tower

    async def relink(self, index: int) -> None:
        self.relinked += 1
        await self._link(index)

    async def _link(self, index: int) -> None:
        self._epoch += 1
        await self.context.connect(index, replace(self._links[index], epoch=self._epoch))


class Service:
    """A pair with N denoisers, watched every few milliseconds."""

    def __init__(self, context: ContextTowerActor, keeper: Keeper, pair: PairTowers) -> None:
        self.context, self.keeper, self.pair = context, keeper, pair
        self.watching = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            await self.pair.check()
            await asyncio.sleep(0.01)

    async def tokens(
        self, row_id: str, prompt: Sequence[int], params: GenerationParams
    ) -> list[int]:
        blocks = generate_blocks(self.pair.context, self.pair.denoiser, row_id, prompt, params)
        async with aclosing(blocks):
            return [token async for block in blocks for token in block.token_ids]

    async def all_rows(self) -> list[list[int]]:
        rows = [self.tokens(f"row-{i}", *row) for i, row in enumerate(ROWS)]
        return list(await asyncio.gather(*rows))

    async def assert_empty(self) -> None:
        """Nothing of any row is left on either side, once all denoisers are back."""
        for seat in self.pair._seats:
            await asyncio.wait_for(seat.ready.wait(), 30)
        for _ in range(500):
            context, denoiser = await self.context.stats(), await self.pair.stats()
            left = [context.rows, context.slots_used, denoiser.rows, denoiser.mirrors]
            left += [denoiser.slots_used, denoiser.pages_used]
            if not any(left):
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"left: {left}")

    async def close(self) -> None:
        self.watching.cancel()
        await asyncio.gather(self.watching, return_exceptions=True)
        await self.context.close()
        for tower in self.keeper.towers.values():
            await tower.actor.close()


@pytest.fixture(scope="module")
def undisturbed() -> list[list[int]]:
    model = TwoTower.from_pretrained(TINY)
    outputs = []
    for prompt, params in ROWS:
        options = {
            name: getattr(params, name)
            for name in ("mode", "max_tokens", "block_size", "confidence_threshold", "temperature")
        }
        outputs.append(list(model.generate([prompt], seed=params.seed, **options)[0].token_ids))
    return outputs


async def service_with(denoisers: int) -> Service:
    context = ContextTowerActor(TOPOLOGY)
    await context.load()
    keeper = Keeper(context)
    towers = [await keeper.start(index) for index in range(denoisers)]
    pair = PairTowers(
        context,
        towers,
        keeper.start,
        keeper.relink,
        repair_timeout_s=20.0,
        answer_timeout_s=0.5,
    )
    return Service(context, keeper, pair)


@pytest.fixture(params=[1, 2])
async def service(request: pytest.FixtureRequest) -> AsyncIterator[Service]:
    made = await service_with(request.param)
    yield made
    await made.close()


@pytest.fixture
async def single() -> AsyncIterator[Service]:
    made = await service_with(1)
    yield made
    await made.close()


async def test_rows_are_spread_and_get_what_they_get_in_one_process(
    service: Service, undisturbed: list[list[int]]
) -> None:
    assert await service.all_rows() == undisturbed
    await service.assert_empty()
    for tower in service.keeper.towers.values():
        assert (await tower.stats()).passes > 0


@pytest.mark.parametrize("disturbance", ["kill", "hang", "cut"])
async def test_no_row_notices_that_a_denoiser_was_lost(
    service: Service, undisturbed: list[list[int]], disturbance: str
) -> None:
    """At a random moment, twelve rows in all modes being anywhere between prefill and their end."""
    draw = random.Random(disturbance)
    working = asyncio.create_task(service.all_rows())
    await asyncio.sleep(draw.uniform(0.05, 0.5))
    index = draw.randrange(len(service.keeper.towers))
    tower = service.keeper.towers[index]
    before = service.keeper.started
    if disturbance == "kill":
        await tower.kill()
    elif disturbance == "hang":
        tower.hung = True
    else:
        await service.context._links._links[index].close()
    assert await asyncio.wait_for(working, 60) == undisturbed
    await service.assert_empty()
    if disturbance == "cut":
        assert service.keeper.relinked == 1
        assert service.keeper.started == before
    else:
        assert service.keeper.started == before + 1


async def test_drafts_of_a_block_come_again_after_a_loss(single: Service) -> None:
    # A position a step: eight steps of each block.
    params = replace(BASE, max_tokens=16, confidence_threshold=1.0, provisional=True)
    want = await single.tokens("undisturbed", PROMPTS[0], replace(params, provisional=False))
    rows = generate_blocks(single.pair.context, single.pair.denoiser, "row", PROMPTS[0], params)
    drafts: list[ProvisionalBlock] = []
    got: list[int] = []
    async for item in rows:
        if isinstance(item, Block):
            got += item.token_ids
            continue
        drafts.append(item)
        if len(drafts) == 3:
            await single.keeper.towers[0].kill()
    assert got == want
    assert single.keeper.started == 2
    seen = Counter((draft.start, draft.step) for draft in drafts)
    assert (seen[4, 0], seen[12, 0]) == (2, 1)
    # Made again they are the same.
    assert len(set(drafts)) == len(seen) < len(drafts)
    await single.assert_empty()


async def test_a_denoiser_that_dies_again_and_again(
    single: Service, undisturbed: list[list[int]]
) -> None:
    working = asyncio.create_task(single.all_rows())
    for _ in range(2):
        await asyncio.sleep(0.2)
        await single.keeper.towers[0].kill()
        while single.keeper.towers[0].dead.is_set() and not working.done():
            await asyncio.sleep(0.01)
    assert await asyncio.wait_for(working, 60) == undisturbed
    await single.assert_empty()


async def test_a_row_that_is_cancelled_while_it_moves_leaves_nothing(single: Service) -> None:
    rows = [asyncio.create_task(single.tokens(f"row-{i}", *row)) for i, row in enumerate(ROWS)]
    await asyncio.sleep(0.2)
    await single.keeper.towers[0].kill()
    for delay, row in enumerate(rows):
        await asyncio.sleep(0.02 * (delay % 3))
        row.cancel()
    await asyncio.gather(*rows, return_exceptions=True)
    await single.assert_empty()


async def test_a_denoiser_that_does_not_come_back_ends_the_pair(single: Service) -> None:
    single.watching.cancel()
    single.keeper.fails = True
    await single.keeper.towers[0].kill()
    row = asyncio.create_task(single.tokens("row", *ROWS[0]))

    async def watch() -> None:
        for _ in range(MOST_REPAIRS + 1):
            await single.pair.check()
            await asyncio.sleep(0.05)

    with pytest.raises(UnavailableError, match="denoiser tower 0 does not come back"):
        await watch()
    row.cancel()
    await asyncio.gather(row, return_exceptions=True)
    assert (await single.context.stats()).rows == 0


async def test_repairs_that_failed_before_one_that_worked_are_forgotten(
    single: Service, undisturbed: list[list[int]]
) -> None:
    single.watching.cancel()
    for _ in range(2):
        await single.keeper.towers[0].kill()
        single.keeper.fails = True
        for _ in range(MOST_REPAIRS - 1):
            await single.pair.check()
            # For the repair to fail, in the background.
            await asyncio.sleep(0.05)
        single.keeper.fails = False
        await single.pair.check()
        # Waits for the tower in the first one's place.
        assert await single.tokens("row", *ROWS[0]) == undisturbed[0]
        await single.pair.check()


async def test_a_row_that_was_moved_counts_where_it_is_and_nowhere_else(
    undisturbed: list[list[int]],
) -> None:
    service = await service_with(2)
    try:
        service.watching.cancel()
        # Nobody has noticed when the row is assigned to it.
        await service.keeper.towers[0].kill()
        assert await service.tokens("row", *ROWS[0]) == undisturbed[0]
        for _ in range(500):
            place = service.pair.assign("next", 16)
            service.pair.drop("next")
            if place == 0:
                return
            await asyncio.sleep(0.01)
        raise AssertionError("the tower that came back looks busier than the other, without a row")
    finally:
        await service.close()
