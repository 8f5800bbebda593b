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
from twotower.cluster.services.loading import loaded, prepare_process


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
        folder: Path, device: str | torch.device, dtype: torch.dtype, *, expert_products: str
    ) -> tuple[object, ...]:
        return folder, device, dtype, expert_products

    pair = replace(PAIR, dtype="bfloat16", expert_products="fp8")
    got = asyncio.run(loaded(load, pair))
    assert got == (Path(PAIR.model_path), "cpu", torch.bfloat16, "fp8")
