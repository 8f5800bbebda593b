"""Which pair gets a row: affinity, the breaker, and moves, each from its definition."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from tests.deployments.conftest import Clock
from twotower.deployments.routing.policy import (
    FAILURES,
    REST_S,
    WINDOW_S,
    Breaker,
    PairRows,
    Room,
    target_of,
)

ABC = ["a", "b", "c"]


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker(clock)


def lose(breaker: Breaker, pair: str, times: int = FAILURES) -> None:
    for _ in range(times):
        breaker.lost(pair)


def ranks(
    breaker: Breaker, among: Sequence[str] = ABC, *, probe: bool = True
) -> list[Sequence[str]]:
    return breaker.ranked(among, probe=probe)


def test_one_loss_is_forgiven_and_two_are_not(breaker: Breaker) -> None:
    lose(breaker, "a", FAILURES - 1)
    assert ranks(breaker) == [ABC]
    lose(breaker, "a", 1)
    assert ranks(breaker) == [["b", "c"]]


def test_losses_far_apart_do_not_add_up(breaker: Breaker, clock: Clock) -> None:
    for _ in range(5):
        lose(breaker, "a", FAILURES - 1)
        clock.now += WINDOW_S + 1
    assert ranks(breaker) == [ABC]


def test_a_pair_is_probed_once_in_a_while(breaker: Breaker, clock: Clock) -> None:
    lose(breaker, "a")
    for _ in range(3):
        clock.now += REST_S
        assert ranks(breaker, probe=False) == [["b", "c"]]
        assert ranks(breaker) == [["a"], ["b", "c"]]
        assert ranks(breaker) == [["b", "c"]]
        lose(breaker, "a", 1)


def test_a_pair_that_works_is_taken_back(breaker: Breaker) -> None:
    lose(breaker, "a")
    assert [breaker.avoids(pair) for pair in ABC] == [True, False, False]
    breaker.worked("a")
    assert ranks(breaker) == [ABC]


def test_if_no_pair_works_all_are_tried(breaker: Breaker) -> None:
    for pair in ABC:
        lose(breaker, pair)
    assert ranks(breaker) == [ABC]
    assert ranks(breaker, ["a"]) == [["a"]]


def test_a_pair_that_is_gone_is_forgotten(breaker: Breaker) -> None:
    lose(breaker, "a")
    assert ranks(breaker, ["b", "c"]) == [["b", "c"]]
    assert ranks(breaker) == [ABC]


def rows_of(begun: int, waiting: int) -> PairRows:
    return PairRows(
        begun={f"begun-{number}" for number in range(begun)},
        waiting=dict.fromkeys(f"row-{number}" for number in range(waiting)),
    )


def movers(here: PairRows, rows: dict[str, int], room: Room) -> list[str]:
    return [row for row in here.waiting if target_of(row, here, rows, room) is not None]


@pytest.mark.parametrize("seed", range(200))
def test_the_oldest_that_certainly_wait_may_go_as_many_as_fit(seed: int) -> None:
    draw = random.Random(seed)
    places = draw.randint(1, 6)
    share = draw.randint(1, places)
    here = rows_of(draw.randint(0, places), draw.randint(0, 3 * places))
    rows = {f"pair-{number}": draw.randint(0, places + 2) for number in range(draw.randint(0, 4))}
    ahead = {row: len(here.begun) + place for place, row in enumerate(here.waiting)}
    certain = [row for row in here.waiting if ahead[row] >= places]
    free = sum(max(0, share - count) for count in rows.values())
    assert movers(here, rows, Room(places, share)) == certain[:free]


def test_rows_go_to_the_pair_with_the_most_room() -> None:
    here = rows_of(4, 3)
    assert target_of("row-0", here, {"a": 7, "b": 2, "c": 1, "d": 3}, Room(4, 4)) == "c"
    assert target_of("row-0", here, {"a": 7, "b": 4, "c": 9}, Room(4, 4)) is None
    assert target_of("row-0", here, {}, Room(4, 4)) is None


def test_a_row_that_may_have_a_place_stays() -> None:
    """Its prompt may be read at this moment: what comes before it leaves it a place."""
    here = rows_of(2, 5)
    assert movers(here, {"b": 0}, Room(4, 4)) == ["row-2", "row-3", "row-4"]
    assert movers(here, {"b": 0}, Room(7, 7)) == []
    assert target_of("begun-0", here, {"b": 0}, Room(1, 1)) is None


def test_each_move_makes_one_less() -> None:
    """All look in turn: no more go than there are places, and each is the oldest then."""
    here, rows, gone = rows_of(3, 20), {"a": 23, "b": 1, "c": 0}, []
    for _ in range(30):
        looked = random.Random(len(gone)).sample(list(here.waiting), len(here.waiting))
        for row in looked:
            target = target_of(row, here, rows, Room(4, 4))
            if target is not None:
                here.drop(row)
                rows[target] += 1
                gone.append(row)
    assert sorted(gone, key=lambda row: int(row[4:])) == [f"row-{n}" for n in range(1, 8)]
    assert (rows["b"], rows["c"]) == (4, 4)


@pytest.mark.parametrize(
    ("routers", "share"), [(1, 16), (2, 8), (3, 5), (16, 1), (17, 1), (100, 1)]
)
def test_routers_have_equal_shares(routers: int, share: int) -> None:
    assert Room.of(16, routers) == Room(16, share)
