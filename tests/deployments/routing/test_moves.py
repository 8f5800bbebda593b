"""Who moves, from the definition: rows that certainly wait, the oldest first, as many as fit."""

from __future__ import annotations

import random

import pytest

from twotower.deployments.routing.assignments import PairRows
from twotower.deployments.routing.moves import Room, target_of


def rows_of(begun: int, waiting: int) -> PairRows:
    return PairRows(
        begun={f"begun-{number}" for number in range(begun)},
        waiting=dict.fromkeys(f"row-{number}" for number in range(waiting)),
    )


def movers(here: PairRows, rows: dict[str, int], room: Room) -> list[str]:
    return [row for row in here.waiting if target_of(row, here, rows, room) is not None]


@pytest.mark.parametrize("seed", range(20))
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
