"""Rows side by side: where their tokens, slots and pages are."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from twotower.kernels.rows import HostRows, Rows

PAGES = torch.tensor([[7, 3, 0], [5, 1, 2], [9, 9, 9]], dtype=torch.int32)
PAGE_TOKENS = 4


def rows_of(
    lengths: Sequence[int],
    slots: Sequence[int] | None = None,
    context_lens: Sequence[int] | None = None,
) -> Rows:
    count = len(lengths)
    return Rows.build(
        lengths, slots or [0] * count, context_lens or [0] * count, PAGES, PAGE_TOKENS
    )


def unknown_on_the_host(rows: Rows) -> Rows:
    """The same rows as a pass on a device sees them: tensors alone."""
    return Rows(
        rows.cu_seqlens,
        rows.slots,
        rows.context_lens,
        rows.pages,
        rows.page_tokens,
        rows.max_seqlen,
    )


def found(rows: Rows) -> list[tuple[int, int, int, int]]:
    return [(run.row, run.count, run.token, run.length) for run in rows.host.runs]


def test_rows_are_built_from_numbers() -> None:
    rows = rows_of([2, 1, 4], [1, -1, 0], [6, 0, 12])
    assert [part.dtype for part in (rows.cu_seqlens, rows.slots, rows.context_lens)] == [
        torch.int32
    ] * 3
    assert rows.cu_seqlens.tolist() == [0, 2, 3, 7]
    assert rows.slots.tolist() == [1, -1, 0]
    assert rows.context_lens.tolist() == [6, 0, 12]
    assert (rows.count, rows.max_seqlen, rows.page_tokens) == (3, 4, 4)
    assert rows.pages is PAGES


def test_the_host_knows_what_the_tensors_say() -> None:
    rows = rows_of([2, 1, 4, 4], [1, -1, 0, 2], [6, 0, 12, 1])
    want = HostRows((0, 2, 3, 7, 11), (1, -1, 0, 2), (6, 0, 12, 1))
    assert rows.host == unknown_on_the_host(rows).host == want
    assert rows.host.total == 11
    assert rows.host.lengths == (2, 1, 4, 4)


def test_runs_join_neighbours_of_one_length() -> None:
    rows = rows_of([2, 2, 5, 1, 1, 1, 2])
    assert found(rows) == [(0, 2, 0, 2), (2, 1, 4, 5), (3, 3, 9, 1), (6, 1, 12, 2)]
    assert rows.host.total == 14
    assert rows.host.cu_seqlens == (0, 2, 4, 9, 10, 11, 12, 14)
    assert [list(run.rows) for run in rows.host.runs] == [[0, 1], [2], [3, 4, 5], [6]]


def test_runs_leave_padding_out() -> None:
    """Padding has tokens, which count; it parts neighbours and is in no run."""
    lengths, slots = [3, 3, 3, 3, 1, 1, 2, 2], [0, -1, 2, 1, -1, -1, -1, 0]
    assert found(rows_of(lengths, slots)) == [(0, 1, 0, 3), (2, 2, 6, 3), (7, 1, 16, 2)]
    assert found(rows_of([4, 4], [-1, -1])) == []


def test_a_run_is_a_view_of_its_tokens() -> None:
    packed = torch.arange(14).view(7, 2)
    part = rows_of([1, 3, 3]).host.runs[1].take(packed)
    assert part.tolist() == [[[2, 3], [4, 5], [6, 7]], [[8, 9], [10, 11], [12, 13]]]
    part[0, 0, 0] = -1
    assert packed[1, 0] == -1


def test_a_run_of_columns_of_a_wider_tensor() -> None:
    wide = torch.arange(24).view(4, 6)
    assert rows_of([2, 2]).host.runs[0].take(wide[:, 1:3]).tolist() == [
        [[1, 2], [7, 8]],
        [[13, 14], [19, 20]],
    ]


def test_rows_find_their_tokens() -> None:
    host = rows_of([2, 1, 4]).host
    assert [host.slice_of(row) for row in range(3)] == [slice(0, 2), slice(2, 3), slice(3, 7)]


def test_a_row_has_the_pages_of_its_visible_and_new_tokens() -> None:
    rows = rows_of([1, 3, 1, 2, 1, 4], [1, 0, 1, 0, 0, -1], [0, 1, 4, 3, 8, 0])
    assert rows.host_pages == ([5], [7], [5, 1], [7, 3], [7, 3, 0], [])


def test_new_tokens_go_behind_the_visible_ones() -> None:
    """Page 5 holds the pool's tokens 20 to 23, page 1 those from 4 on; padding goes nowhere."""
    rows = rows_of([3, 2, 1], [1, -1, 0], [2, 1, 0])
    assert rows.new_places.tolist() == [22, 23, 4, 28]
    assert rows.real_tokens is not None
    assert rows.real_tokens.tolist() == [0, 1, 2, 5]
    assert rows_of([3, 2], [1, 0], [2, 1]).real_tokens is None
