"""Figures of the cost of lookup drafts, on texts of which they are known."""

from __future__ import annotations

from benchmarks.lookup_cost import leading, measured, texts


def test_texts_have_the_length_that_was_asked_for() -> None:
    assert {name: len(text) for name, text in texts(1000).items()} == dict.fromkeys(
        ("source", "loop", "random", "three ids", "ascending"), 1000
    )


def test_a_loop_is_drafted_and_distinct_tokens_are_not() -> None:
    loop = measured("loop", [1, 2, 3] * 100, 30, 20)
    assert (loop["text"], loop["prompt"], loop["accepted_per_round"]) == ("loop", 30, 15.0)
    assert measured("distinct", list(range(300)), 30, 20)["accepted_per_round"] == 0.0


def test_accepted_tokens_are_the_leading_ones() -> None:
    assert leading([1, 2, 3], [1, 2, 4, 3]) == 2
    assert leading([1, 2], [1, 2, 4]) == 2
    assert leading([1, 2], [1]) == 1
    assert leading([], [1]) == 0
