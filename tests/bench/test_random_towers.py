"""Towers made without a checkpoint are built like loaded ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.bench.conftest import CPU
from tests.support.random_model import write_checkpoint
from twotower.bench.filled import FilledPool
from twotower.bench.random_towers import TowerMaker
from twotower.kernels.quantized import QuantizedExperts
from twotower.planner.shapes import TINY
from twotower.towers.checkpoint.weights import load_context_tower, load_denoiser_tower
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.model.denoiser_tower import DenoiserTower
from twotower.towers.model.weights import MoeWeights


def described(part: object, name: str = "") -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, shape and dtype of everything in a tree of weights; lists of experts as one stack."""
    if isinstance(part, Tensor):
        yield name, tuple(part.shape), str(part.dtype)
    elif isinstance(part, tuple | list) and part and isinstance(part[0], Tensor):
        yield name, (len(part), *part[0].shape), str(part[0].dtype)
    elif isinstance(part, tuple | list):
        for index, own in enumerate(part):
            yield from described(own, f"{name}.{index}")
    elif dataclasses.is_dataclass(part):
        for field in dataclasses.fields(part):
            yield from described(getattr(part, field.name), f"{name}.{field.name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_is_that_of_a_loaded_tower(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = write_checkpoint(tmp_path, TINY)
    maker = TowerMaker(TINY, CPU, dtype, torch.Generator().manual_seed(0))
    context, denoiser = (
        load_context_tower(folder, CPU, dtype),
        load_denoiser_tower(folder, CPU, dtype),
    )
    made = maker.denoiser()
    assert list(described(maker.context().weights)) == list(described(context.weights))
    assert list(described(made.weights)) == list(described(denoiser.weights))
    assert list(described(made.timestep)) == list(described(denoiser.timestep))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_passes_stay_finite_and_of_unit_size(dtype: torch.dtype) -> None:
    maker = TowerMaker(TINY, CPU, dtype, torch.Generator().manual_seed(1))
    pool = FilledPool(TINY, 2, 8, CPU, dtype)
    denoiser, context = maker.denoiser(), maker.context()
    with pool.rows_at(100, 2, 16) as states:
        drafts = [[3] * 16, [5, 3] * 8]
        for hidden in (
            denoiser.forward(drafts, [1.0, 0.5], states),
            context.forward(drafts, states),
        ):
            logits = context.logits(hidden).float()
            assert bool(torch.isfinite(logits).all())
            assert 0.2 < float(logits.std()) < 5.0


def test_the_seed_decides_the_weights() -> None:
    first, again, other = (
        TowerMaker(TINY, CPU, torch.float32, torch.Generator().manual_seed(seed)).context()
        for seed in (3, 3, 4)
    )
    assert torch.equal(first.weights.head, again.weights.head)
    assert not torch.equal(first.weights.head, other.weights.head)


def test_quantized_experts_take_the_place_of_the_same_full_ones() -> None:
    full, small = (
        TowerMaker(TINY, CPU, torch.float32, torch.Generator().manual_seed(5), experts).context()
        for experts in ("full", "fp8")
    )
    for one, other in zip(full.weights.layers, small.weights.layers, strict=True):
        if not isinstance(one.mixer, MoeWeights):
            continue
        assert isinstance(other.mixer, MoeWeights)
        assert isinstance(other.mixer.up, QuantizedExperts)
        assert other.mixer.up.values.element_size() == 1
        error = (other.mixer.up[0] - one.mixer.up[0]).norm() / one.mixer.up[0].norm()
        assert 0.0 < float(error) < 0.05


def test_quantized_experts_are_multiplied_as_asked() -> None:
    generator = torch.Generator().manual_seed(5)
    tower = TowerMaker(TINY, CPU, torch.float32, generator, "fp8", expert_products="fp8").context()
    (mixer, *_) = (one.mixer for one in tower.weights.layers if isinstance(one.mixer, MoeWeights))
    assert isinstance(mixer.up, QuantizedExperts)
    assert isinstance(mixer.down, QuantizedExperts)
    assert mixer.up.products == mixer.down.products == "fp8"


def test_both_kinds_are_what_they_say(maker: TowerMaker) -> None:
    assert type(maker.context()) is ContextTower
    assert type(maker.denoiser()) is DenoiserTower
