"""The commit rules, by cases written by hand and by random blocks."""

from __future__ import annotations

import random
from typing import get_args

import pytest

from twotower.towers.decoding.unmasking import BlockDraft, CommitName, ReplayRule, ThresholdRule

MASK = 3
NAMES: tuple[CommitName, ...] = get_args(CommitName)


def draft(length: int, threshold: float, steps: int) -> BlockDraft:
    return BlockDraft(length, MASK, ThresholdRule(threshold, steps))


def test_a_new_block_is_all_masks() -> None:
    block = draft(4, 0.5, 4)
    assert block.token_ids == [3, 3, 3, 3]
    assert block.masked == [0, 1, 2, 3]
    assert block.timestep == 1.0
    assert not block.done


def test_a_block_by_hand() -> None:
    block = draft(4, 0.8, 4)
    # Two are above the threshold, the one exactly on it is not.
    assert sorted(block.commit([10, 11, 12, 13], [0.9, 0.8, 0.81, 0.1])) == [0, 2]
    assert block.token_ids == [10, 3, 12, 3]
    assert block.timestep == 0.5
    # None is above it: the best one is committed.
    assert block.commit([21, 23], [0.3, 0.4]) == [3]
    assert block.token_ids == [10, 3, 12, 23]
    assert block.commit([31], [0.01]) == [1]
    assert block.done
    assert block.token_ids == [10, 31, 12, 23]
    assert block.commit_steps == [0, 2, 0, 1]
    assert block.confidences == [0.9, 0.01, 0.81, 0.4]
    assert block.step == 3


@pytest.mark.parametrize(
    ("masked", "steps", "step", "count"),
    [
        (16, 16, 0, 1),
        (16, 4, 0, 4),
        (16, 5, 0, 4),
        (12, 5, 1, 3),
        (9, 5, 2, 3),
        (6, 5, 3, 3),
        (3, 5, 4, 3),
        (16, 1, 0, 16),
        (2, 16, 15, 2),
        (5, 16, 20, 5),
        (1, 40, 0, 1),
    ],
)
def test_enough_are_committed_to_be_done_in_time(
    masked: int, steps: int, step: int, count: int
) -> None:
    for name in NAMES[:3]:
        assert len(ThresholdRule(1.0, steps, name).chosen([0.5] * masked, step)) == count
    leading = ThresholdRule(1.0, steps, "leading").chosen([0.5] * masked, step)
    assert len(leading) == (masked if step >= steps - 1 else 1)


@pytest.mark.parametrize("name", NAMES)
def test_the_threshold_is_strict(name: CommitName) -> None:
    def count(threshold: float, confidence: float) -> int:
        return len(ThresholdRule(threshold, 16, name).chosen([confidence] * 4, 0))

    assert count(0.5, 0.5) == 1
    assert count(1.0, 1.0) == 1
    assert count(0.0, 1e-9) == 4
    assert count(0.0, 0.0) == 1


@pytest.mark.parametrize(
    ("name", "committed"),
    [
        ("released", [[3], [4], [1, 2], [0, 5]]),
        ("leftmost", [[3], [0], [1, 2], [4, 5]]),
        ("product", [[0, 1], [2, 3], [4], [5]]),
        ("leading", [[0, 1], [2, 3], [4], [5]]),
    ],
)
def test_a_block_by_hand_with_each_rule(name: CommitName, committed: list[list[int]]) -> None:
    """What a step predicts at each position; in this order the committed ones are listed."""
    block = BlockDraft(6, MASK, ThresholdRule(0.6, 4 if name == "leading" else 6, name))
    steps = [
        [0.5, 0.6, 0.5, 0.7, 0.1, 0.2],
        [0.4, 0.3, 0.55, 0.59, 0.58, 0.1],
        [0.1, 0.95, 0.9, 0.2, 0.6, 0.6],
        [0.9, 0.1, 0.1, 0.1, 0.7, 0.8],
    ]
    if name in ("product", "leading"):
        steps[0][:3] = [0.9, 0.8, 0.8]
        steps[1][2] = 0.99
        steps[1][3] = 0.9
        steps[1][4] = 0.6
    for confidences, expected in zip(steps, committed, strict=True):
        given = [confidences[i] for i in block.masked]
        assert sorted(block.commit([9] * len(given), given)) == expected
    assert block.done


def test_the_rest_of_a_fair_share_are_the_most_confident() -> None:
    confidences = [0.2, 0.3, 0.6, 0.1, 0.9, 0.4]
    chosen = {name: ThresholdRule(0.8, 2, name).chosen(confidences, 0) for name in NAMES}
    assert chosen["released"] == [4, 2, 5]
    assert chosen["leftmost"] == [4, 2, 5]
    assert chosen["product"] == [0, 4, 2]
    assert chosen["leading"] == [0]
    assert ThresholdRule(0.95, 2, "leftmost").chosen(confidences, 0) == [0, 4, 2]
    assert ThresholdRule(0.1, 6, "product").chosen([0.5, 0.5, 0.5, 0.5], 0) == [0, 1, 2]


def test_a_product_skips_what_is_committed() -> None:
    block = BlockDraft(4, MASK, ThresholdRule(0.5, 4, "product"), known=[7])
    assert block.commit([1, 2, 3], [0.8, 0.6, 0.9]) == [1]
    assert block.commit([2, 3], [0.9, 0.6]) == [2, 3]
    assert block.token_ids == [7, 1, 2, 3]
    assert block.commit_steps == [0, 0, 1, 1]


def test_ties_go_to_the_leftmost_position() -> None:
    block = draft(5, 1.0, 5)
    assert block.commit([1] * 5, [0.2, 0.7, 0.7, 0.1, 0.7]) == [1]
    assert block.commit([1] * 4, [0.5] * 4) == [0]
    assert block.commit([1] * 3, [0.4, 0.6, 0.6]) == [3]


def test_positions_are_those_of_the_block_not_of_the_masks() -> None:
    block = draft(4, 0.5, 4)
    block.commit([1, 2, 0, 4], [0.9, 0.9, 0.1, 0.9])
    assert block.masked == [2]
    assert block.commit([7], [0.2]) == [2]
    assert block.token_ids == [1, 2, 7, 4]


def test_a_recorded_schedule() -> None:
    rule = ReplayRule((3, 1))
    counts = [len(rule.chosen([0.1] * left, step)) for step, left in enumerate((8, 5, 4))]
    assert counts == [3, 1, 4]
    assert rule.chosen([0.1], 0) == [0]
    assert rule.chosen([0.1, 0.3, 0.2, 0.3], 0) == [1, 3, 2]


@pytest.mark.parametrize("seed", range(20))
def test_random_blocks(seed: int) -> None:
    """Committed tokens never change, each step commits the best, the block ends in time."""
    source = random.Random(seed)
    length, steps = source.randint(1, 40), source.randint(1, 40)
    threshold = source.choice([0.0, 0.3, 0.5, 0.9, 1.0])
    block = draft(length, threshold, steps)
    calls = 0
    while not block.done:
        before, masked = list(block.token_ids), list(block.masked)
        tokens = [source.randint(4, 99) for _ in masked]
        confidences = [source.choice([0.1, 0.5, source.random()]) for _ in masked]
        committed = block.commit(tokens, confidences)
        calls += 1
        by_position = dict(zip(masked, confidences, strict=True))
        assert set(committed) <= set(masked)
        for position in range(length):
            if position in committed:
                assert block.token_ids[position] == tokens[masked.index(position)]
                assert block.commit_steps[position] == calls - 1
                assert block.confidences[position] == by_position[position]
            else:
                assert block.token_ids[position] == before[position]
        left = [(by_position[p], -p) for p in masked if p not in committed]
        taken = [(by_position[p], -p) for p in committed]
        assert not left or min(taken) > max(left)
        above = sum(value > threshold for value in confidences)
        assert len(committed) >= max(above, 1)
        # No more than the threshold or the remaining steps ask for.
        assert len(committed) <= max(above, 1, -(-len(masked) // max(1, steps - calls + 1)))
    assert calls <= min(steps, length)
    assert sorted(block.commit_steps)[-1] == calls - 1
