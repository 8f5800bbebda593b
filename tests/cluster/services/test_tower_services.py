"""The proxy of a denoiser tower asks its actor for drafts only if somebody watches."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from tests.support.actors import Actor
from twotower.cluster.services import tower_services
from twotower.cluster.services.actors import DenoiserTowerActor
from twotower.cluster.services.colocated import ColocatedActor
from twotower.cluster.services.remote import RemoteContext, RemoteDenoiser
from twotower.cluster.services.tower_services import DenoiserTowerService, Side
from twotower.cluster.topology import PairTopology
from twotower.towers.decoding.services import Block, ProvisionalBlock, Watcher
from twotower.towers.engine.options import EngineOptions
from twotower.towers.errors import NumericalError, UnavailableError
from twotower.towers.request.params import GenerationParams

PARAMS = GenerationParams(seed=1)
BLOCK = Block(3, (7, 8), (0, 1), (0.5, 0.5), nfe=3)
DRAFTS = [ProvisionalBlock(3, step, (7, step), (False, True), (0.5, 0.25)) for step in (0, 1)]
TOPOLOGY = PairTopology(
    model_path="",
    device="cpu",
    dtype="float32",
    engine=EngineOptions(),
    cpus_per_tower=0.4,
    gpus_per_tower=0.0,
)


class Engine:
    """Makes the block over and over, and writes down how it was asked."""

    def __init__(self, *, fail: Exception | None = None) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self._fail = fail

    async def denoise_block(self, *how: Any) -> Block:
        *asked, watch = how
        self.asked.append((*asked, watch is not None))
        for draft in DRAFTS if watch else ():
            watch(draft)
            await asyncio.sleep(0)
        if self._fail is not None:
            raise self._fail
        return BLOCK


def remote(
    side: Side | None, engine: Engine, death: Exception | None = None
) -> tuple[DenoiserTowerService, Actor]:
    """The proxy of a tower alone, or of one that shares its process."""
    if side is None:
        tower = DenoiserTowerActor(TOPOLOGY)
        tower.run(engine)  # type: ignore[arg-type]
        actor = Actor(tower, death)
    else:
        both = ColocatedActor(TOPOLOGY)
        both._denoiser.run(engine)  # type: ignore[arg-type]
        actor = Actor(both, death)
    return RemoteDenoiser(actor, side), actor


async def denoise(tower: DenoiserTowerService, watch: Watcher | None) -> Block:
    return await tower.denoise_block("row", 3, PARAMS, (7,), (5, 7), watch)


SIDES: list[Any] = [None, "denoiser"]


@pytest.fixture
def every_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    """No draft is left out for coming too soon after another."""
    monkeypatch.setattr(tower_services, "DRAFT_PERIOD_S", 0.0)


@pytest.mark.parametrize("side", SIDES, ids=["apart", "colocated"])
async def test_drafts_that_follow_each_other_at_once_are_left_out(side: Side | None) -> None:
    """Each costs a message on every hop: the block does not wait for them."""
    tower, _ = remote(side, Engine())
    seen: list[ProvisionalBlock] = []
    assert await denoise(tower, seen.append) == BLOCK
    assert seen == DRAFTS[:1]


@pytest.mark.usefixtures("every_draft")
@pytest.mark.parametrize("side", SIDES, ids=["apart", "colocated"])
async def test_drafts_come_over_a_stream_and_last_the_block(side: Side | None) -> None:
    engine = Engine()
    tower, actor = remote(side, engine)
    seen: list[ProvisionalBlock] = []
    assert await denoise(tower, seen.append) == BLOCK
    assert seen == DRAFTS
    assert actor.kinds == ["stream"]
    assert engine.asked == [("row", 3, PARAMS, (7,), (5, 7), True)]


@pytest.mark.parametrize("side", SIDES, ids=["apart", "colocated"])
async def test_without_a_watcher_it_is_one_call(side: Side | None) -> None:
    engine = Engine()
    tower, actor = remote(side, engine)
    assert await denoise(tower, None) == BLOCK
    assert actor.kinds == ["call"]
    assert engine.asked == [("row", 3, PARAMS, (7,), (5, 7), False)]


@pytest.mark.usefixtures("every_draft")
@pytest.mark.parametrize("side", SIDES, ids=["apart", "colocated"])
async def test_errors_of_a_stream_are_those_of_the_tower(side: Side | None) -> None:
    seen: list[ProvisionalBlock] = []
    tower, _ = remote(side, Engine(fail=NumericalError("nan")))
    with pytest.raises(NumericalError, match="nan"):
        await denoise(tower, seen.append)
    assert seen == DRAFTS
    tower, _ = remote(side, Engine(), ActorDiedError())
    with pytest.raises(UnavailableError, match="is gone"):
        await denoise(tower, seen.append)


class OvertakenTower:
    """A tower's actor in which a release runs before the call that opened the row, as Ray may run
    calls of an actor."""

    def __init__(self) -> None:
        self.rows: set[str] = set()
        self.may_open = asyncio.Event()

    async def open(self, row_id: str, _capacity: int) -> int:
        await self.may_open.wait()
        self.rows.add(row_id)
        return 0

    async def open_for(self, row_id: str, capacity: int, _denoiser: int) -> int:
        return await self.open(row_id, capacity)

    async def release(self, row_id: str) -> None:
        self.rows.discard(row_id)


@pytest.mark.parametrize("kind", ["context", "context for a denoiser", "denoiser"])
async def test_a_row_whose_release_overtakes_its_open_is_not_left(kind: str) -> None:
    actor = OvertakenTower()
    tower = (RemoteDenoiser if kind == "denoiser" else RemoteContext)(Actor(actor))
    if kind == "context for a denoiser":
        assert isinstance(tower, RemoteContext)
        opening = asyncio.ensure_future(tower.open_for("row", 8, 0))
    else:
        opening = asyncio.ensure_future(tower.open("row", 8))
    await asyncio.sleep(0)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    # What the block loop does in any case; the row is not open yet.
    await tower.release("row")
    actor.may_open.set()
    for _ in range(10):
        await asyncio.sleep(0)
    assert actor.rows == set()
