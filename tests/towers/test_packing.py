"""Rows side by side."""

from __future__ import annotations

import torch

from twotower.towers.packing import Packing


def test_runs_join_neighbours_of_one_length() -> None:
    packing = Packing([2, 2, 5, 1, 1, 1, 2])
    found = [(run.row, run.count, run.token, run.length) for run in packing.runs]
    assert found == [(0, 2, 0, 2), (2, 1, 4, 5), (3, 3, 9, 1), (6, 1, 12, 2)]
    assert packing.total == 14
    assert packing.starts == (0, 2, 4, 9, 10, 11, 12, 14)
    assert [list(run.rows) for run in packing.runs] == [[0, 1], [2], [3, 4, 5], [6]]


def test_a_run_is_a_view_of_its_tokens() -> None:
    packing = Packing([1, 3, 3])
    packed = torch.arange(14).view(7, 2)
    part = packing.runs[1].take(packed)
    assert part.tolist() == [[[2, 3], [4, 5], [6, 7]], [[8, 9], [10, 11], [12, 13]]]
    part[0, 0, 0] = -1
    assert packed[1, 0] == -1


def test_a_run_of_columns_of_a_wider_tensor() -> None:
    wide = torch.arange(24).view(4, 6)
    assert Packing([2, 2]).runs[0].take(wide[:, 1:3]).tolist() == [
        [[1, 2], [7, 8]],
        [[13, 14], [19, 20]],
    ]


def test_rows_find_their_tokens() -> None:
    packing = Packing([2, 1, 4])
    assert [packing.slice_of(row) for row in range(3)] == [slice(0, 2), slice(2, 3), slice(3, 7)]


def test_what_belongs_to_a_row_is_given_to_each_of_its_tokens() -> None:
    per_row = torch.tensor([[1.0], [2.0], [3.0]])
    assert Packing([2, 1, 3]).spread(per_row).flatten().tolist() == [1, 1, 2, 3, 3, 3]
    # A single row needs no copies: the one entry broadcasts.
    assert Packing([5]).spread(per_row[:1]).shape == (1, 1)
