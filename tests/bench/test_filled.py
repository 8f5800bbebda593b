"""Rows that stand anywhere at once."""

from __future__ import annotations

import pytest
import torch

from tests.bench.conftest import ROWS
from twotower.bench.filled import FilledPool
from twotower.towers.errors import CapacityError
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.model.denoiser_tower import DenoiserTower


def test_a_row_opens_at_its_context_with_something_everywhere(pool: FilledPool) -> None:
    with pool.rows_at(300, 2, 100) as states:
        for state in states:
            assert state.position == state.length == 300
            assert state.capacity == 400
            k, v = state.kv(0, 0, 300)
            for held in (state.conv, state.ssm, k, v):
                assert float(held.float().std()) == pytest.approx(1.0, abs=0.2)
        assert not torch.equal(states[0].ssm, states[1].ssm)


def test_both_towers_go_on_from_there(
    pool: FilledPool, context_tower: ContextTower, denoiser_tower: DenoiserTower
) -> None:
    with pool.rows_at(300, 2, 32) as states:
        drafts = [[5] * 16, [6] * 16]
        before = [state.ssm.clone() for state in states]
        hidden = denoiser_tower.forward(drafts, [0.5, 0.5], states)
        assert bool(torch.isfinite(hidden).all())
        assert all(torch.equal(a, b.ssm) for a, b in zip(before, states, strict=True))
        hidden = context_tower.forward(drafts, states)
        assert bool(torch.isfinite(hidden).all())
        for state in states:
            context_tower.advance(state, 16)
            assert state.position == 316


def test_rows_are_taken_back_even_if_not_all_fit(pool: FilledPool) -> None:
    with pytest.raises(CapacityError), pool.rows_at(100, ROWS + 1, 16):
        pass
    assert pool.slots_used == pool.pages_used == 0


def test_a_context_longer_than_the_row_is_refused(pool: FilledPool) -> None:
    pool.context = 65
    with pytest.raises(ValueError, match="context: got 65, expected at most 64"):
        pool.open(64)


def test_a_row_that_has_read_nothing_is_empty(pool: FilledPool) -> None:
    with pool.rows_at(0, 2, 32) as states:
        for state in states:
            assert state.position == state.length == 0
            assert not bool(state.ssm.any() | state.conv.any())
