"""Threads of a tower's process: what was asked for, or half of the CPUs that it may use; and how
its tower is loaded."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.cluster.test_topology import PAIR
from twotower.cluster.services import loading
from twotower.cluster.services.colocated import ColocatedActor
from twotower.cluster.services.loading import loaded, prepare_process
from twotower.towers.checkpoint.weights import load_context_tower, load_denoiser_tower

TINY = Path(__file__).parents[2] / "golden" / "tiny_b"


@pytest.mark.parametrize(
    ("asked", "usable", "threads"), [(3, 32, 3), (None, 32, 16), (None, 3, 1), (None, 1, 1)]
)
def test_threads_of_a_tower(
    asked: int | None, usable: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", taken.append)
    monkeypatch.setattr(loading, "usable_cpus", lambda: usable)
    before = sys.getswitchinterval()
    try:
        prepare_process(replace(PAIR, num_threads=asked))
    finally:
        sys.setswitchinterval(before)
    assert taken == [threads]


def test_a_tower_is_loaded_as_the_pair_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "prepare_process", lambda _: None)

    def load(
        folder: Path, device: str | torch.device, dtype: torch.dtype, **others: object
    ) -> tuple[object, ...]:
        return folder, device, dtype, others

    pair = replace(PAIR, dtype="bfloat16", expert_products="fp8")
    got = asyncio.run(loaded(load, pair))
    others = {"expert_products": "fp8", "deterministic": False}
    assert got == (Path(PAIR.model_path), "cpu", torch.bfloat16, others)


@pytest.mark.parametrize("wanted", [False, True])
async def test_towers_are_loaded_in_the_mode_of_their_pair(
    wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Apart and in one process."""
    monkeypatch.setattr(loading, "prepare_process", lambda _: None)
    pair = replace(PAIR, model_path=str(TINY), deterministic=wanted)
    apart = await loaded(load_context_tower, pair), await loaded(load_denoiser_tower, pair)
    together = await loaded(ColocatedActor(pair)._load_engines, pair)
    towers = [*apart, *(engine.tower for engine in together)]
    assert {tower.deterministic for tower in towers} == {wanted}
