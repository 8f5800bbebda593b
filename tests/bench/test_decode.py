"""Whole rows through the engines, from filled contexts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.bench.conftest import ROWS, TOKENS
from twotower.bench.decode import EnginePair, Run
from twotower.planner.schedules import PROFILES, mean_steps, shuffled_rows
from twotower.towers.errors import CapacityError
from twotower.towers.request.modes import Mode

HEADLINE = len(PROFILES["headline"])


def diffusion(rows: int, *, in_step: bool, context: int = 100) -> Run:
    schedules = shuffled_rows("headline", rows, 0, in_step=in_step)
    return Run("mask_diffusion", rows, context, HEADLINE, 2, 16, schedules)


def test_rows_in_step_take_exactly_the_passes_of_their_schedule(pair: EnginePair) -> None:
    run = diffusion(3, in_step=True)
    done = pair.decode(run)
    assert done.tokens_a_block == 16
    assert done.nfe_a_block == pytest.approx(mean_steps(PROFILES["headline"]))
    # Two warm-up blocks are not among them; every pass has all rows.
    assert done.denoiser.passes == sum(map(len, PROFILES["headline"]))
    assert done.denoiser.rows_a_pass == done.context.rows_a_pass == 3
    assert done.context.passes == HEADLINE
    assert done.tokens_per_s == pytest.approx(3 * 16 / done.seconds_a_block, rel=0.1)


def test_rows_out_of_step_do_the_same_work_in_more_passes(pair: EnginePair) -> None:
    together = pair.decode(diffusion(ROWS, in_step=True))
    apart = pair.decode(diffusion(ROWS, in_step=False))
    assert apart.nfe_a_block == pytest.approx(together.nfe_a_block)
    assert apart.denoiser.rows_a_pass < together.denoiser.rows_a_pass == ROWS
    assert apart.denoiser.passes > together.denoiser.passes


def test_ar_takes_a_pass_a_token(pair: EnginePair) -> None:
    done = pair.decode(Run("ar", 2, 100, 3))
    assert done.tokens_a_block == 16
    assert done.nfe_a_block == done.denoiser.passes == 0
    assert done.context.passes == 3 * 16
    assert done.context.rows_a_pass == 2


def test_verified_takes_a_draft_and_a_check_a_block(pair: EnginePair) -> None:
    done = pair.decode(Run("verified", 2, 100, 4))
    assert done.nfe_a_block == 1
    assert 1 <= done.tokens_a_block <= 16
    assert done.denoiser.passes == done.context.passes == 4


@pytest.mark.parametrize("mode", ["ar", "mask_diffusion", "verified"])
def test_nothing_is_left_of_a_run(pair: EnginePair, mode: Mode) -> None:
    pair.decode(replace(diffusion(2, in_step=True), mode=mode, blocks=2))
    stats = pair.context.stats()
    assert stats["slots_used"] == stats["pages_used"] == stats["rows"] == 0
    assert pair.denoiser.num_rows == 0


def test_a_row_that_can_never_fit_is_an_error_and_not_a_wait(pair: EnginePair) -> None:
    with pytest.raises(CapacityError, match="expected at most"):
        pair.decode(Run("ar", 2, ROWS * TOKENS + 1, 1))
    assert pair.decode(Run("ar", 2, 100, 1)).tokens_a_block == 16
