"""Attempts by pair: where each is, in which order, and that none is left."""

from __future__ import annotations

import random

import pytest

from twotower.deployments.routing.assignments import Assignments


@pytest.fixture
def rows() -> Assignments:
    found = Assignments()
    for row_id in ("1", "2", "3"):
        found.opened(row_id)
        found.routed(row_id, "a", suspect=False)
    return found


def test_rows_wait_in_the_order_in_which_they_came(rows: Assignments) -> None:
    assert list(rows.on("a").waiting) == ["1", "2", "3"]
    rows.began("2")
    assert (list(rows.on("a").waiting), rows.on("a").begun) == (["1", "3"], {"2"})
    rows.began("2")
    assert rows.counts() == {"a": 3}
    assert [rows.pair_of(row_id) for row_id in "123"] == ["a"] * 3


def test_a_row_that_was_sent_counts_before_it_is_there(rows: Assignments) -> None:
    rows.sent("4", "b")
    assert (rows.counts(), rows.target_of("4"), rows.pair_of("4")) == ({"a": 3, "b": 1}, "b", None)
    rows.opened("4")
    assert rows.target_of("4") == "b"
    rows.routed("4", "b", suspect=False)
    assert (rows.counts(), rows.target_of("4"), rows.pair_of("4")) == ({"a": 3, "b": 1}, None, "b")


def test_a_row_that_was_sent_may_land_elsewhere(rows: Assignments) -> None:
    rows.sent("4", "b")
    rows.routed("4", "a", suspect=True)
    assert rows.counts() == {"a": 4}
    assert rows.is_suspect("4")
    assert not rows.is_suspect("1")


def test_what_is_routed_after_its_end_is_not_followed(rows: Assignments) -> None:
    """Serve's thread may be late: nobody would ever end the row again."""
    rows.ended("1")
    rows.routed("1", "a", suspect=False)
    rows.routed("never opened", "b", suspect=False)
    rows.began("1")
    rows.ended("1")
    assert rows.counts() == {"a": 2}


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_left_of_what_has_ended(seed: int) -> None:
    draw, rows = random.Random(seed), Assignments()
    names = [str(number) for number in range(12)]
    for _ in range(400):
        name, pair = draw.choice(names), draw.choice("abc")
        if draw.random() < 0.2 and rows.pair_of(name) is None and rows.target_of(name) is None:
            rows.sent(name, pair)
        draw.choice(
            [
                lambda name=name: rows.opened(name),
                lambda name=name, pair=pair: rows.routed(name, pair, suspect=False),
                lambda name=name: rows.began(name),
                lambda name=name: rows.ended(name),
            ]
        )()
        known = [row for row in names if rows.pair_of(row) or rows.target_of(row)]
        assert sum(rows.counts().values()) == len(known)
    for name in names:
        rows.ended(name)
    assert rows.counts() == {}
