"""The recorded schedules and what is computed from them."""

from __future__ import annotations

import pytest

from twotower.planner.schedules import (
    ARITHMETIC,
    CODE,
    FACT,
    LOOP,
    PROFILES,
    WORD_PROBLEM,
    Replay,
    draw_rows,
    lockstep_passes,
    masked_share,
    mean_steps,
    shuffled_rows,
)
from twotower.towers.request.params import GenerationParams


def test_the_recorded_blocks_are_those_of_the_source() -> None:
    mixed = PROFILES["mixed"]
    assert all(sum(block) == 16 and min(block) >= 1 for block in mixed)
    assert (len(mixed), min(map(len, mixed)), max(map(len, mixed))) == (23, 2, 16)


def test_rows_are_drawn_from_the_profile_by_their_seed() -> None:
    rows = draw_rows("code", 5, 7, seed=1)
    assert [len(row) for row in rows] == [7] * 5
    assert {block for row in rows for block in row} <= set(PROFILES["code"])
    assert rows == draw_rows("code", 5, 7, seed=1) != draw_rows("code", 5, 7, seed=2)


def test_a_row_replays_its_own_schedule_again_and_again() -> None:
    rule = Replay([[(16,), (6, 10)], [(1, 15)]])
    first = [rule(GenerationParams(seed=0)) for _ in range(3)]
    second = rule(GenerationParams(seed=1))
    assert [len(each.chosen([0.5] * 16, 0)) for each in first] == [16, 6, 16]
    assert len(second.chosen([0.5] * 16, 0)) == 1


@pytest.mark.parametrize(
    ("width", "passes"),
    [
        (1, 1 + 2 + 3 + 2 + 4 + 3),  # nobody waits for another
        (2, 3 + 4 + 3),  # rows 0 and 1, row 2 with row 0 again, rows 1 and 2
        (3, 4 + 3),  # first blocks, second blocks
        (16, 4 + 3),  # a row has one block at a time
    ],
)
def test_lockstep_waits_for_the_slowest_row_of_every_round(width: int, passes: int) -> None:
    steps = [[1, 2], [3, 2], [4, 3]]
    rows = [[(1,) * count for count in row] for row in steps]
    assert lockstep_passes(rows, width) == passes


@pytest.mark.parametrize(
    ("profile", "published"),
    [("headline", 5.6), ("code", 6.5), ("prose", 12.0), ("word_problem", 8.0)],
)
def test_a_profile_has_the_published_mean(profile: str, published: float) -> None:
    assert mean_steps(PROFILES[profile]) == pytest.approx(published, abs=0.05)


def test_every_profile_is_made_of_recorded_blocks() -> None:
    recorded = {*WORD_PROBLEM, *FACT, *CODE, *ARITHMETIC, *LOOP}
    assert all(set(blocks) <= recorded for blocks in PROFILES.values())


def test_the_masked_share_counts_every_pass_of_a_block() -> None:
    # 16 of 16 masked, then 10; one pass over 16: (1 + 10/16 + 1) / 3.
    assert masked_share([(6, 10), (16,)]) == pytest.approx(2.625 / 3)


def test_shuffled_rows_hold_the_whole_profile_each() -> None:
    own = shuffled_rows("mixed", 5, seed=3, in_step=False)
    assert all(sorted(row) == sorted(PROFILES["mixed"]) for row in own)
    assert len({tuple(row) for row in own}) == 5
    together = shuffled_rows("mixed", 5, seed=3, in_step=True)
    assert len({tuple(row) for row in together}) == 1
