"""Sizes of passes that run as graphs, and works cut into them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from twotower.towers.engine.buckets import (
    GRAPH_TOKENS,
    MAX_LENGTH,
    ROW_BUCKETS,
    bucket_for,
    buckets_up_to,
    rows_at_once,
    run_in_parts,
)


def test_a_pass_is_padded_to_the_next_bucket() -> None:
    sizes = (1, 2, 3, 5, 9, 17, 65, 128)
    assert [bucket_for(rows) for rows in sizes] == [1, 2, 4, 8, 12, 24, 96, 128]
    with pytest.raises(ValueError, match="rows: got 129, expected at most 128"):
        bucket_for(129)


def test_a_graph_holds_as_many_rows_as_its_tokens_allow() -> None:
    assert [rows_at_once(length) for length in (1, 16, 17, 64, 3000)] == [128, 128, 96, 32, 1]
    for length in range(1, MAX_LENGTH + 1):
        assert rows_at_once(length) * length <= GRAPH_TOKENS


def test_the_largest_bucket_is_captured_first() -> None:
    assert buckets_up_to(9) == [12, 8, 4, 2, 1]
    assert buckets_up_to(1000) == list(reversed(ROW_BUCKETS))
    assert buckets_up_to(1000, 64)[0] == 32
    assert buckets_up_to(1000, MAX_LENGTH + 1) == []


def test_works_of_one_shape_run_together_as_far_as_a_graph_holds_them() -> None:
    parts: list[list[int]] = []

    def run(works: Sequence[int]) -> list[str]:
        parts.append(list(works))
        return [str(work) for work in works]

    # Odd numbers are blocks of 64 tokens, even numbers of one token.
    works = list(range(200))
    results = run_in_parts(works, lambda work: (64 if work % 2 else 1,), run)
    assert results == [str(work) for work in works]
    odd = works[1::2]
    assert parts == [works[::2], odd[:32], odd[32:64], odd[64:96], odd[96:]]


def test_a_part_with_a_result_too_few_is_a_fault() -> None:
    with pytest.raises(ValueError, match="zip"):
        run_in_parts([1, 2], lambda _: (1,), lambda works: [0] * (len(works) - 1))
