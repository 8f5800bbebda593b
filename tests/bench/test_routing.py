"""Routing as narrow as real text's."""

from __future__ import annotations

import pytest
import torch

from twotower.bench.filled import FilledPool
from twotower.bench.probes import Probe, measured_unique
from twotower.bench.random_towers import TowerMaker
from twotower.bench.routing import steer, steer_to, wanted_unique
from twotower.planner.shapes import LARGE, TINY


def test_wanted_experts_grow_as_measured_ones() -> None:
    wanted = [wanted_unique(LARGE, 34.0, rows) for rows in (1, 2, 4, 8, 16)]
    assert wanted == pytest.approx([34, 59, 91, 117, 127], abs=1.5)


def test_barred_experts_are_never_chosen(maker: TowerMaker, pool: FilledPool) -> None:
    tower = maker.denoiser()
    steer(tower, 5)
    with pool.rows_at(64, 4, 16) as states:
        chosen = Probe.of("denoise", tower, states, 16).experts_chosen()
    per_layer = [set(ids.flatten().tolist()) for ids in chosen]
    assert len(per_layer) == 2
    assert all(len(ids) <= 5 for ids in per_layer)
    assert per_layer[0] != per_layer[1]
    steer(tower, TINY.n_routed_experts)
    assert measured_unique("denoise", tower, pool, 4, 16) > 5


def test_the_search_ends_near_what_is_wanted(maker: TowerMaker, pool: FilledPool) -> None:
    torch.manual_seed(0)
    tower = maker.denoiser()
    opened, measured = steer_to(tower, pool, 1, 16, 8.0)
    assert TINY.num_experts_per_tok <= opened < TINY.n_routed_experts
    assert measured == pytest.approx(8.0, abs=2.0)
    assert measured <= opened
