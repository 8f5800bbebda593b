"""What a router knows of the pairs: losses and moves by the name of the attempt."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.deployments.conftest import Clock
from twotower.deployments.routing.affinity import STEP_TOKENS
from twotower.deployments.routing.pairs import FULL_S, Pairs
from twotower.deployments.routing.policy import FAILURES, REST_S, Room

ROOM = Room(4, 4)
ONE = Room(1, 1)


@pytest.fixture
def pairs(clock: Clock) -> Pairs:
    found = Pairs(clock)
    found.present(["a", "b"])
    return found


def put(pairs: Pairs, pair: str, *rows: str) -> None:
    for row in rows:
        pairs.opened(row)
        pairs.routed(row, pair)


def lose(pairs: Pairs, pair: str) -> None:
    for number in range(FAILURES):
        put(pairs, pair, f"lost-{number}")
        pairs.lost(f"lost-{number}")
        pairs.ended(f"lost-{number}")


def ranks(pairs: Pairs) -> list[set[str]]:
    """Both pairs in the ranks of a choice for a row."""
    return [set(rank) for rank in pairs.choice("asked")]


def moved(pairs: Pairs, *rows: str, room: Room = ROOM) -> list[str]:
    return [row for row in rows if pairs.moved(row, f"{row}'", room)]


def test_a_loss_is_expected_of_a_pair_that_was_avoided_when_it_got_the_attempt(
    pairs: Pairs,
) -> None:
    """Those that went down together with the pair may each have been the reason."""
    put(pairs, "a", "1", "2", "3")
    assert [pairs.lost(row) for row in ("1", "2", "3")] == [False] * 3
    put(pairs, "a", "4")
    assert pairs.lost("4")
    put(pairs, "b", "5")
    assert not pairs.lost("5")
    assert not pairs.lost("unknown")


def test_a_probe_that_works_takes_the_pair_back(pairs: Pairs, clock: Clock) -> None:
    lose(pairs, "a")
    clock.now += REST_S
    assert ranks(pairs) == [{"a"}, {"b"}]
    put(pairs, "a", "probe")
    pairs.worked("probe")
    assert ranks(pairs) == [{"a", "b"}]


def test_a_probe_that_was_cancelled_says_nothing(pairs: Pairs, clock: Clock) -> None:
    lose(pairs, "a")
    clock.now += REST_S
    ranks(pairs)
    put(pairs, "a", "probe")
    pairs.ended("probe")
    assert ranks(pairs) == [{"b"}]
    clock.now += REST_S
    assert ranks(pairs) == [{"a"}, {"b"}]


def test_attempts_that_nobody_routed_say_nothing(pairs: Pairs) -> None:
    """As in local testing mode, where Serve chooses nothing."""
    for _ in range(FAILURES):
        pairs.opened("row")
        pairs.lost("row")
        pairs.worked("row")
        pairs.ended("row")
    assert ranks(pairs) == [{"a", "b"}]
    assert pairs.rows() == {}


def test_the_oldest_that_wait_move_and_no_more_than_fit(pairs: Pairs) -> None:
    rows = [str(number) for number in range(12)]
    put(pairs, "a", *rows)
    put(pairs, "b", "other")
    # The youngest look first.
    assert moved(pairs, *reversed(rows)) == ["6", "5", "4"]
    assert pairs.rows() == {"a": 9, "b": 4}
    assert moved(pairs, *rows) == []
    assert [pairs.target_of(f"{row}'") for row in "456"] == ["b"] * 3
    assert pairs.target_of("7'") is None


def test_with_several_routers_a_row_that_may_have_a_place_is_not_sent_to_and_fro(
    pairs: Pairs,
) -> None:
    """Four places, two of them this router's share: it alone may have all four."""
    shared = Room(4, 2)
    put(pairs, "a", "long", "1", "2", "3")
    for row in "123":
        # They have overtaken it: its prompt is long.
        pairs.worked(row)
    assert moved(pairs, "long", room=shared) == []
    put(pairs, "a", *"4567")
    # Four before them have places; the other pair takes this router's share.
    assert moved(pairs, "long", *"4567", room=shared) == ["4", "5"]


def test_a_target_that_turns_out_full_is_none_for_a_while(pairs: Pairs, clock: Clock) -> None:
    put(pairs, "a", *"01234567")
    assert moved(pairs, "4") == ["4"]
    # Serve has found no place there, and chose the next best.
    put(pairs, "a", "4'")
    assert moved(pairs, *"567") == []
    clock.now += FULL_S
    assert moved(pairs, "5") == ["5"]
    put(pairs, "b", "5'")
    # Here the tower itself refuses.
    pairs.refused("5'")
    pairs.ended("5'")
    assert moved(pairs, *"67") == []
    clock.now += FULL_S
    assert moved(pairs, "6") == ["6"]


def test_a_place_that_comes_free_is_taken_by_the_next(pairs: Pairs) -> None:
    put(pairs, "a", *"012345678")
    assert moved(pairs, *"012345678") == list("4567")
    put(pairs, "b", *(f"{row}'" for row in "4567"))
    for row in "4567":
        pairs.worked(f"{row}'")
    assert moved(pairs, "8") == []
    pairs.ended("5'")
    assert moved(pairs, *"0123", "4'", "8") == ["8"]


def test_a_row_that_has_brought_a_block_stays(pairs: Pairs) -> None:
    put(pairs, "a", *"01234567")
    for row in "67":
        pairs.worked(row)
    # Four have a place, these two among them: of the others 0 and 1 may have one.
    assert moved(pairs, *"01234567") == list("2345")


def test_a_row_has_a_place_once_those_before_it_have_gone(pairs: Pairs) -> None:
    put(pairs, "a", *"01234")
    pairs.ended("2")
    assert moved(pairs, *"0134") == []


def test_nobody_moves_to_a_pair_that_is_avoided_or_gone(pairs: Pairs, clock: Clock) -> None:
    put(pairs, "a", *"012345")
    lose(pairs, "b")
    assert moved(pairs, *"012345") == []
    clock.now += REST_S
    assert moved(pairs, *"012345") == []
    pairs.present(["a", "b", "c"])
    assert moved(pairs, "4") == ["4"]
    assert pairs.target_of("4'") == "c"
    pairs.present(["a"])
    assert moved(pairs, "5") == []


def test_rows_leave_a_pair_that_gets_no_more(pairs: Pairs) -> None:
    """Taken away by autoscaling: it ends the rows that it works on, the others need not wait."""
    put(pairs, "a", *"012345")
    pairs.present(["b"])
    assert moved(pairs, *"012345") == ["4", "5"]


def test_a_row_without_a_pair_does_not_move(pairs: Pairs) -> None:
    pairs.opened("queued in Serve")
    assert moved(pairs, "queued in Serve", "unknown", room=ONE) == []
    put(pairs, "a", "0", "1")
    assert moved(pairs, "1", room=ONE) == ["1"]
    assert moved(pairs, "1'", room=ONE) == []


def test_many_threads_move_no_more_than_fit(pairs: Pairs) -> None:
    rows = [str(number) for number in range(400)]
    put(pairs, "a", *rows)
    with ThreadPoolExecutor(8) as pool:
        went = list(pool.map(lambda row: pairs.moved(row, f"{row}'", Room(50, 50)), rows * 3))
    assert sum(went) == 50
    assert pairs.rows() == {"a": 350, "b": 50}


def test_a_row_that_was_sent_counts_before_it_is_there(pairs: Pairs) -> None:
    put(pairs, "a", "1", "2")
    assert moved(pairs, "2", room=ONE) == ["2"]
    assert (pairs.rows(), pairs.target_of("2'")) == ({"a": 1, "b": 1}, "b")
    pairs.opened("2'")
    assert pairs.target_of("2'") == "b"
    pairs.routed("2'", "b")
    assert (pairs.rows(), pairs.target_of("2'")) == ({"a": 1, "b": 1}, None)


def test_a_row_that_was_sent_may_land_elsewhere(pairs: Pairs) -> None:
    put(pairs, "a", "1", "2")
    assert moved(pairs, "2", room=ONE) == ["2"]
    pairs.routed("2'", "a")
    assert pairs.rows() == {"a": 2}


def test_what_is_routed_after_its_end_is_not_followed(pairs: Pairs) -> None:
    """Serve's thread may be late: nobody would ever end the row again."""
    put(pairs, "a", "1", "2", "3")
    pairs.ended("1")
    pairs.routed("1", "a")
    pairs.routed("never opened", "b")
    pairs.worked("1")
    pairs.ended("1")
    assert pairs.rows() == {"a": 2}


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_left_of_what_has_ended(pairs: Pairs, seed: int) -> None:
    draw, alive = random.Random(seed), set[str]()
    names = [str(number) for number in range(12)]
    for _ in range(400):
        name, other = draw.sample(names, 2)
        if draw.random() < 0.3 and other not in alive and pairs.moved(name, other, ONE):
            alive = (alive - {name}) | {other}
        what = draw.choice(["routed", "routed", "worked", "ended"])
        if what == "routed":
            pairs.opened(name)
            pairs.routed(name, draw.choice("ab"))
            alive.add(name)
        elif what == "worked":
            pairs.worked(name)
        else:
            pairs.ended(name)
            alive.discard(name)
        assert sum(pairs.rows().values()) == len(alive)
    for name in names:
        pairs.ended(name)
    assert pairs.rows() == {}


def report(rows: float, read_at: float) -> dict[str, dict[str, float]]:
    return {"context": {"rows": rows, "queued_rows": 0.0, "clock_seconds": read_at}}


def owner(pairs: Pairs, prompt: tuple[int, ...]) -> set[str]:
    """The pair that a prompt belongs to: the rank before all others; empty if there is none."""
    first, *others = pairs.choice("asked", prompt)
    return set(first) if others else set()


def test_a_prompt_leaves_a_pair_that_other_routers_have_filled(pairs: Pairs) -> None:
    prompt = tuple(range(STEP_TOKENS))
    (own,) = owner(pairs, prompt)
    (other,) = {"a", "b"} - {own}
    pairs.reported({own: report(100, 1.0), other: report(100, 1.0)})
    assert owner(pairs, prompt) == {own}
    pairs.reported({own: report(140, 2.0), other: report(100, 2.0)})
    assert owner(pairs, prompt) == {other}
    pairs.reported({own: report(100, 3.0), other: report(100, 3.0)})
    assert owner(pairs, prompt) == {own}


def test_a_pair_with_a_queue_gets_no_prompt_of_its_own(pairs: Pairs) -> None:
    prompt = tuple(range(STEP_TOKENS))
    (own,) = owner(pairs, prompt)
    queue = {"context": {"rows": 8.0, "queued_rows": 1.0, "clock_seconds": 1.0}}
    pairs.reported({own: queue, ({"a", "b"} - {own}).pop(): report(8, 1.0)})
    assert owner(pairs, prompt) != {own}


def waits(rows: float, queued: float, read_at: float) -> dict[str, dict[str, float]]:
    return {"context": {"rows": rows, "queued_rows": queued, "clock_seconds": read_at}}


def test_of_several_routers_each_moves_rows_that_wait_by_the_reports(
    pairs: Pairs, clock: Clock
) -> None:
    pairs.routers(4)
    put(pairs, "a", "begun", "1", "2")
    pairs.worked("begun")
    # This router alone has fewer rows there than the pair has places.
    pairs.reported({"a": waits(9, 5, 1.0), "b": waits(0, 0, 1.0)})
    assert moved(pairs, "1") == []
    # That report came with the rows: it does not say that they wait. The next does.
    clock.now += 1.0
    pairs.reported({"a": waits(9, 1, 2.0), "b": waits(0, 0, 2.0)})
    # Of those that came last one waits: the other may have been let in.
    assert moved(pairs, "begun", "1") == []
    assert moved(pairs, *(["2"] * 50)) == ["2"]
    assert pairs.target_of("2'") == "b"


def test_a_row_is_moved_by_reports_twice_at_most(pairs: Pairs, clock: Clock) -> None:
    pairs.routers(4)
    put(pairs, "a", "1")
    row, here = "1", "a"
    for number in range(3):
        there = "b" if here == "a" else "a"
        clock.now += 1.0
        pairs.reported({here: waits(9, 5, number), there: waits(0, 0, number)})
        if number == 2:
            assert moved(pairs, *([row] * 50)) == []
            return
        assert moved(pairs, *([row] * 50)) == [row]
        row, here = f"{row}'", there
        pairs.routed(row, here)


def test_a_prompt_that_is_asked_for_again_counts_once(pairs: Pairs) -> None:
    prompt = tuple(range(STEP_TOKENS))
    pairs.opened("1")
    for _ in range(50):
        pairs.choice("1", prompt)
    assert len(pairs._beginnings._recent) == 1


def test_rows_stay_where_the_reports_show_no_room(pairs: Pairs, clock: Clock) -> None:
    pairs.routers(4)
    put(pairs, "a", "1")
    clock.now += 1.0
    pairs.reported({"a": waits(9, 5, 1.0), "b": waits(4, 0, 1.0)})
    assert moved(pairs, "1") == []
    # Places of a pair that had none a moment ago do not count.
    pairs.reported({"a": waits(9, 5, 2.0), "b": waits(0, 0, 2.0)})
    put(pairs, "b", "refused")
    pairs.refused("refused")
    pairs.ended("refused")
    assert moved(pairs, "1") == []
    clock.now += FULL_S
    assert moved(pairs, *(["1"] * 200)) == ["1"]


def test_routers_together_move_about_as_many_rows_as_there_is_room(clock: Clock) -> None:
    random.seed(1)
    routers = [Pairs(clock) for _ in range(20)]
    for number, each in enumerate(routers):
        each.present(["a", "b"])
        each.routers(20)
        put(each, "a", *(f"{number}-{row}" for row in range(20)))
    clock.now += 1.0
    for each in routers:
        # 400 rows wait, and 100 places are free.
        each.reported({"a": waits(500, 400, 1.0), "b": waits(0, 0, 1.0)})
    room = Room(100, 5)
    gone = [
        moved(each, *(f"{number}-{row}" for row in range(20)), room=room)
        for number, each in enumerate(routers)
    ]
    # Half of the room at a look; what a router has sent counts for all of them at once.
    assert 20 <= sum(map(len, gone)) <= 80


def test_a_pair_that_is_avoided_gets_no_prompt_of_its_own(pairs: Pairs) -> None:
    prompt = tuple(range(STEP_TOKENS))
    (own,) = owner(pairs, prompt)
    lose(pairs, own)
    assert owner(pairs, prompt) == {"a", "b"} - {own}


def test_another_call_belongs_nowhere_and_probes_nobody(pairs: Pairs, clock: Clock) -> None:
    lose(pairs, "a")
    clock.now += REST_S
    assert pairs.choice(None) == [["b"]]
    assert ranks(pairs) == [{"a"}, {"b"}]
    pairs.present([])
    assert pairs.choice("row", tuple(range(STEP_TOKENS))) == [[]]
