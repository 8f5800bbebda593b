"""A small fleet in simulated time: what has to hold whatever is lost, and what routing gains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.fleet.agenda import Agenda
from benchmarks.fleet.figures import between, mark, percentiles, totals
from benchmarks.fleet.fleet import Fleet, Size
from benchmarks.fleet.load import Chat, Request, Traffic
from benchmarks.fleet.pairs import PairFigures, PrefixCounts, Row, SimulatedPair
from benchmarks.fleet.scenario import Played

SIZE = Size(pairs=12, routers=4, requests=120, traffic=Traffic(systems=40, answer_blocks=24.0))


@pytest.fixture(scope="module")
def played() -> tuple[Fleet, dict[str, Any]]:
    fleet = Fleet(SIZE, seed=3)
    return fleet, Played(fleet).play()


def test_every_request_ends_once_and_whole_whatever_is_lost(
    played: tuple[Fleet, dict[str, Any]],
) -> None:
    fleet, found = played
    whole = found["totals"]
    assert whole["requests"] == whole["ended_whole"] > 5 * SIZE.requests
    assert (whole["ended_not_once"], whole["given_up"], whole["under_way"]) == (0, 0, 0)
    assert len({request.number for request in fleet.ended}) == len(fleet.ended)
    assert whole["reissued"] > 0 < whole["resumed_by_clients"]
    # Nothing is left in a pair or in a router's table.
    assert [pair.rows for pair in fleet.pairs] == [0] * SIZE.pairs
    assert all(not router.attempts for router in fleet.routers)


def test_what_is_lost_is_what_goes_on_elsewhere(played: tuple[Fleet, dict[str, Any]]) -> None:
    _, found = played
    times = found["times"]
    assert times["pair_lost"]["reissued"] == times["pair_lost"]["struck"] > 0
    assert times["router_lost"]["resumed_by_clients"] == times["router_lost"]["struck"] > 0
    # Those that were there, and those that were sent there before anybody knew.
    assert times["zone_lost"]["reissued"] >= times["zone_lost"]["struck"] > 0
    assert times["steady"]["reissued"] == times["steady"]["resumed_by_clients"] == 0


def test_a_zone_whose_loss_is_known_at_once_costs_exactly_its_rows() -> None:
    fleet = Fleet(SIZE, seed=4)
    fleet.agenda.run(30.0)
    there = sum(pair.rows for pair in fleet.pairs if pair.zone == 1)
    begin = mark(fleet)
    assert fleet.lose_zone(1, notice_s=0.0, back_s=10.0) == there > 0
    fleet.agenda.run(50.0)
    found = between(fleet, begin, mark(fleet))
    assert found["reissued"] == there
    assert found["pause_s"]["max"] < 10.0
    assert len(fleet.pairs) == SIZE.pairs


def test_the_same_seed_gives_the_same_figures() -> None:
    def figures(seed: int) -> tuple[Any, Any]:
        fleet = Fleet(SIZE, seed)
        begin = mark(fleet)
        fleet.agenda.run(15.0)
        return between(fleet, begin, mark(fleet)), totals(fleet)

    assert figures(5) == figures(5) != figures(6)


def test_affinity_finds_more_than_chance_and_less_than_one_cache_of_all() -> None:
    def steady(size: Size) -> dict[str, Any]:
        fleet = Fleet(size, seed=7)
        fleet.agenda.run(30.0)
        begin = mark(fleet)
        fleet.agenda.run(50.0)
        return between(fleet, begin, mark(fleet))

    ours, chance = steady(SIZE), steady(replace(SIZE, affinity=False))
    assert chance["prefix_hits"] + 0.1 < ours["prefix_hits"] < ours["prefix_hits_ideal"]
    # Ten rows a pair: an eighth more, four, and what other routers send at the same moment.
    assert ours["rows_max_over_mean"]["median"] < 1.8
    assert ours["most_queued_rows"] == 0


def request_of(number: int, blocks: int, tokens: int = 0) -> Request:
    return Request(Chat(number, None, 0, 0, tokens, 1), tokens, blocks, 0.0, number)


def test_rows_of_a_pair_slow_each_other_and_the_next_waits_for_a_slot() -> None:
    agenda, ends = Agenda(), dict[int, float]()
    figures = PairFigures(slots=2, block_s=1.0, row_block_s=0.5, token_blocks=0.0)
    pair = SimulatedPair("pair", figures, agenda, 0, PrefixCounts(9))

    def noting(number: int) -> Callable[[], None]:
        def note() -> None:
            ends[number] = agenda.now

        return note

    for number, blocks in enumerate((2, 4, 3)):
        pair.take(Row(request_of(number, blocks), lambda: None, noting(number), lambda: None))
    assert (pair.rows, pair.free, pair.queued) == (3, 0, 1)
    agenda.run(100.0)
    # Two rows: 2 s a block. 0 ends at 4, 1 at 8; 2 begins at 4, and writes alone from 8 on.
    assert ends == pytest.approx({0: 4.0, 1: 8.0, 2: 9.5})


def test_a_row_that_is_lost_has_committed_its_whole_blocks() -> None:
    agenda, lost = Agenda(), list[float]()
    figures = PairFigures(block_s=1.0, row_block_s=0.0, token_blocks=0.01)
    pair = SimulatedPair("pair", figures, agenda, 0, PrefixCounts(9))
    request = request_of(0, 10, tokens=100)
    pair.take(Row(request, lambda: None, lambda: None, lambda: lost.append(agenda.now)))
    # A second to read the prompt, then a block a second.
    agenda.run(4.5)
    pair.stop()
    agenda.run(8.0)
    pair.end()
    assert (request.committed, lost) == (3, [8.0])


def test_calls_are_made_in_their_order() -> None:
    agenda, made = Agenda(), list[str]()
    agenda.at(2.0, lambda: made.append("late"))
    agenda.at(1.0, lambda: agenda.after(0.5, lambda: made.append("between")))
    agenda.at(2.0, lambda: made.append("later"))
    agenda.every(1.0, lambda: made.append("tick"), first=0.25)
    agenda.run(2.0)
    assert made == ["tick", "tick", "between", "late", "later"]
    assert percentiles([3.0, 1.0, 2.0]) == {"p50": 2.0, "p99": 2.0, "max": 3.0}
