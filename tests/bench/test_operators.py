"""Times of operators inside a pass."""

from __future__ import annotations

import time

import pytest
import torch

from tests.bench.conftest import CPU
from twotower.bench.filled import FilledPool
from twotower.bench.operators import OperatorClock, measure_operators
from twotower.bench.probes import Probe
from twotower.kernels import dispatch
from twotower.kernels.dispatch import Operator
from twotower.planner.floors import Ceilings, pass_works, shape_of
from twotower.planner.shapes import TINY
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.model.denoiser_tower import DenoiserTower

CEILINGS = Ceilings(1e10, 1e10, 1e10)


def test_a_pass_is_taken_apart(denoiser_tower: DenoiserTower, pool: FilledPool) -> None:
    works = pass_works(TINY, shape_of("denoise", TINY, 2, 100, 16, value_bytes=4, expert_bytes=4))
    with pool.rows_at(100, 2, 16) as states:
        probe = Probe.of("denoise", denoiser_tower, states, 16)
        begun = time.perf_counter()
        times = measure_operators(probe.run, denoiser_tower.weights, CPU, works, CEILINGS)
        spent = time.perf_counter() - begun
    by_name = {own.name: own for own in times}
    mamba, moe = TINY.layer_pattern.count("M"), TINY.layer_pattern.count("E")
    calls = {name: by_name[name].calls for name in ("in_proj", "out_proj", "route", "head")}
    assert calls == {"in_proj": mamba, "out_proj": mamba, "route": moe, "head": 1}
    assert all(own.seconds > 0 for own in times)
    assert sum(own.seconds for own in times) < spent
    # Every part of the floor belongs to some operator, and to one alone.
    known = sum(own.floor_seconds for own in times if own.floor_seconds is not None)
    assert known == pytest.approx(sum(own.seconds(CEILINGS) for own in works))


def test_a_replay_counts_with_the_scan(context_tower: ContextTower, pool: FilledPool) -> None:
    with pool.rows_at(100, 2, 128) as states:
        probe = Probe.of("ar", context_tower, states, 16)
        works = pass_works(TINY, shape_of("ar", TINY, 2, 100, 16))
        times = measure_operators(probe.run, context_tower.weights, CPU, works, CEILINGS)
    names = [own.name for own in times]
    assert "mamba_scan and replay" in names
    assert not {"mamba_scan", "replay"} & set(names)


def test_a_call_inside_a_call_belongs_to_the_outer_one(
    denoiser_tower: DenoiserTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outer(x: torch.Tensor) -> torch.Tensor:
        return dispatch.linear(x, denoiser_tower.weights.head)

    monkeypatch.setattr(dispatch, "outer", Operator(outer), raising=False)
    x = torch.randn(2, TINY.hidden_size)
    with OperatorClock(CPU, denoiser_tower.weights) as clock:
        dispatch.outer(x)
        dispatch.linear(x, denoiser_tower.weights.head)
        dispatch.outer(x)
    assert {name: calls for name, (calls, _) in clock.totals().items()} == {"outer": 2, "head": 1}


def test_operators_are_themselves_again_after_an_error(denoiser_tower: DenoiserTower) -> None:
    plain_call = Operator.__call__
    x = torch.randn(2, TINY.hidden_size + 1)
    with pytest.raises(RuntimeError), OperatorClock(CPU, denoiser_tower.weights):
        dispatch.linear(x, denoiser_tower.weights.head)
    assert Operator.__call__ is plain_call
