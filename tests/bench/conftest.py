"""Tiny random towers, made once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from twotower.bench.decode import EnginePair
from twotower.bench.filled import FilledPool, pages_of_rows
from twotower.bench.random_towers import TowerMaker
from twotower.planner.shapes import TINY
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.model.denoiser_tower import DenoiserTower

CPU = torch.device("cpu")
ROWS, TOKENS = 4, 2048


@pytest.fixture(scope="session")
def maker() -> TowerMaker:
    return TowerMaker(TINY, CPU, torch.float32, torch.Generator().manual_seed(7))


@pytest.fixture(scope="session")
def context_tower(maker: TowerMaker) -> ContextTower:
    return maker.context()


@pytest.fixture(scope="session")
def denoiser_tower(maker: TowerMaker) -> DenoiserTower:
    return maker.denoiser()


@pytest.fixture
def pool() -> FilledPool:
    return FilledPool(TINY, ROWS, pages_of_rows(ROWS, TOKENS), CPU, torch.float32)


@pytest.fixture(params=[False, True], ids=["host", "device steps"])
def pair(
    request: pytest.FixtureRequest,
    context_tower: ContextTower,
    denoiser_tower: DenoiserTower,
    pool: FilledPool,
) -> Iterator[EnginePair]:
    """Engines whose steps run on the host, and as on a GPU."""
    towers = (context_tower, denoiser_tower)
    with EnginePair(*towers, pool, 16 * ROWS, device_steps=request.param) as pair:
        yield pair
