"""Figures of a point on outputs that are small enough to count by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from twotower.sweep.metrics import Row, equal_tokens, figures, repeats

ROW = Row((1, 2, 3, 4), "", "length", (-1.0, -1.0, -1.0, -1.0), nfe=0, context_passes=4)


@pytest.mark.parametrize(
    ("token_ids", "expected"),
    [
        ([], []),
        ([1, 2, 3, 4], [False] * 4),
        # 1 2 3 4 stands there already when the last 4 completes it.
        ([1, 2, 3, 4, 1, 2, 3, 4], [False] * 7 + [True]),
        # A loop of one token repeats from its fifth on.
        ([7, 7, 7, 7, 7, 7], [False] * 4 + [True, True]),
        ([1, 2, 3, 4, 9, 2, 3, 4], [False] * 8),
    ],
)
def test_tokens_that_complete_a_4_gram_once_more(
    token_ids: list[int], expected: list[bool]
) -> None:
    assert repeats(token_ids) == expected


def test_equal_tokens_are_counted_up_to_the_shorter_and_after_a_difference_too() -> None:
    assert equal_tokens([1, 2, 3, 4], [1, 9, 3]) == (2, 3)
    assert equal_tokens([1], []) == (0, 0)


def test_figures_of_two_rows() -> None:
    """Six tokens of sum -9 against eight of sum -8."""
    rows = [
        Row((1, 9, 3, 4), "", "length", (-1.0, -2.0, -1.0, -1.0), 3, 1, 2, 8, {"task": 1.0}),
        Row((5, 6), "", "stop", (-2.0, -2.0), 3, 1, 1, 4, {"task": 0.0}),
    ]
    reference = [ROW, replace(ROW, token_ids=(5, 6, 7, 8))]
    found = figures(rows, reference, reference)
    assert found["rows"] == 2
    assert found["tokens"] == 6
    assert found["stopped_share"] == 0.5
    assert found["log_prob"] == pytest.approx(-9 / 6)
    assert found["loss"] == pytest.approx(0.5)
    assert found["relative_quality"] == pytest.approx(math.exp(-0.5))
    assert found["novel_loss"] == pytest.approx(0.5)
    # 1, 3 and 4 of four; both of two, though the reference goes on.
    assert found["agreement"] == pytest.approx(5 / 6)
    assert found["exact_share"] == 0.0
    assert found["repeated_share"] == 0.0
    assert (found["nfe"], found["context_passes"]) == (6, 2)
    assert (found["accepted_tokens"], found["drafted_tokens"]) == (3, 12)
    assert found["tokens_per_nfe"] == 1.0
    assert found["tokens_per_pass"] == pytest.approx(6 / 8)
    assert found["score_task"] == 0.5


def test_regret_is_what_the_most_probable_tokens_had_more() -> None:
    """The first row's tokens lack 0, 1, 0 and 0.5 nats of the best ones, the second's 0.5."""
    rows = [
        replace(ROW, log_probs=(-1.0, -2.0, -1.0, -1.0), best_log_probs=(-1.0, -1.0, -1.0, -0.5)),
        Row((5,), "", "stop", (-2.0,), 1, 1, best_log_probs=(-1.5,)),
    ]
    assert figures(rows, [ROW] * 2, [ROW] * 2)["regret"] == pytest.approx(2.0 / 5)
    assert figures([ROW], [ROW], [ROW])["regret"] is None


def test_tokens_a_pass_of_prompts_whose_ar_output_does_not_loop() -> None:
    """A loop is guessed in one pass, the other output takes four."""
    loop = Row((7,) * 8, "", "length", (-1.0,) * 8, 0, 8)
    rows = [replace(loop, context_passes=1), replace(ROW, nfe=2, context_passes=2)]
    found = figures(rows, [loop, ROW], [loop, ROW])
    assert found["tokens_per_pass"] == pytest.approx(12 / 5)
    assert (found["fresh_rows"], found["fresh_tokens_per_pass"]) == (1, 1.0)
    # What counts is ar's output, not the point's own.
    assert figures(rows, [ROW, ROW], [ROW, ROW])["fresh_rows"] == 2
    none = figures([loop], [loop], [loop])
    assert (none["fresh_rows"], none["fresh_tokens_per_pass"]) == (0, None)


def test_drafts_of_lookups_are_counted_by_themselves() -> None:
    row = replace(
        ROW,
        accepted_tokens=5,
        drafted_tokens=22,
        lookup_accepted_tokens=3,
        lookup_drafted_tokens=7,
    )
    found = figures([row, row], [ROW] * 2, [ROW] * 2)
    assert (found["accepted_tokens"], found["drafted_tokens"]) == (10, 44)
    assert (found["lookup_accepted_tokens"], found["lookup_drafted_tokens"]) == (6, 14)


def test_a_loop_is_likely_and_no_achievement() -> None:
    """The repeated tokens are certain: they raise the mean, and the figure of new ones not."""
    looping = Row((7,) * 8, "", "length", (-2.0,) * 4 + (0.0,) * 4, 8, 0)
    plain = Row((1, 2, 3, 4, 5, 6, 7, 8), "", "length", (-2.0,) * 8, 0, 8)
    found = figures([looping], [plain], [plain])
    assert found["log_prob"] == -1.0
    assert found["loss"] == -1.0
    assert found["novel_loss"] == 0.0
    # Of the five 4-grams the first is new.
    assert found["repeated_share"] == pytest.approx(4 / 5)


def test_intervals_hold_the_figure_and_shrink_to_it_where_prompts_do_not_differ() -> None:
    lower = replace(ROW, log_probs=(-3.0,) * 4)
    same = figures([lower] * 5, [ROW] * 5, [ROW] * 5)
    assert (same["loss_low"], same["loss"], same["loss_high"]) == (2.0, 2.0, 2.0)
    assert (same["agreement_low"], same["agreement_high"]) == (1.0, 1.0)
    mixed = figures([lower] * 5 + [ROW] * 5, [ROW] * 10, [ROW] * 10)
    assert mixed["loss_low"] < mixed["loss"] == 1.0 < mixed["loss_high"]
    assert mixed["loss_low"] > 0.0
    assert mixed["loss_high"] < 2.0


def test_a_loss_is_of_pairs_so_that_prompts_of_other_difficulty_do_not_widen_it() -> None:
    hard = replace(ROW, log_probs=(-9.0,) * 4)
    slightly = [
        replace(row, log_probs=tuple(p - 0.1 for p in row.log_probs)) for row in (ROW, hard)
    ]
    found = figures(slightly * 5, [ROW, hard] * 5, [ROW, hard] * 5)
    assert found["loss_low"] == pytest.approx(0.1)
    assert found["loss_high"] == pytest.approx(0.1)
    assert found["log_prob_high"] - found["log_prob_low"] > 1.0
