"""Which pairs have about as many rows as the others, by reports and by a router's own rows."""

from __future__ import annotations

import pytest

from twotower.deployments.routing.loads import Loads, Report

NAMES = tuple("abcde")


def report(rows: float, read_at: float, queued_rows: float = 0) -> Report:
    return {"context": {"rows": rows, "queued_rows": queued_rows, "clock_seconds": read_at}}


def fitting(loads: Loads) -> str:
    return "".join(name for name, fits in zip(NAMES, loads.fits(), strict=True) if fits)


@pytest.fixture
def loads() -> Loads:
    found = Loads()
    found.present(NAMES, {})
    return found


def all_report(loads: Loads, rows: float, at: float, **others: float) -> None:
    loads.reported({name: report(others.get(name, rows), at) for name in NAMES}, at)


@pytest.mark.parametrize(("rows", "fits"), [(116, "abcde"), (117, "bcde")])
def test_an_eighth_and_four_rows_above_the_mean_are_too_many(
    loads: Loads, rows: int, fits: str
) -> None:
    # The mean is 100, so that 116.5 rows are the limit.
    all_report(loads, (500 - rows) / 4, 1.0, a=rows)
    assert fitting(loads) == fits


def test_without_reports_own_rows_count(loads: Loads) -> None:
    loads.count("a", 5)
    assert fitting(loads) == "abcde"
    loads.count("a", 6)
    assert fitting(loads) == "bcde"
    loads.count("a", 0)
    assert fitting(loads) == "abcde"


def test_own_rows_since_the_report_count_once_for_every_router(loads: Loads) -> None:
    loads.num_routers = 10
    all_report(loads, 100, 1.0)
    loads.count("a", 1)
    assert fitting(loads) == "abcde"
    loads.count("a", 3)
    assert fitting(loads) == "bcde"
    # The report has them.
    all_report(loads, 100, 2.0)
    assert fitting(loads) == "abcde"


def test_own_rows_that_have_ended_count_once(loads: Loads) -> None:
    loads.num_routers = 10
    loads.count("a", 10)
    all_report(loads, 100, 1.0, a=130)
    loads.count("a", 5)
    assert fitting(loads) == "bcde"


def test_a_report_that_is_told_again_does_not_undo_what_has_come_since(loads: Loads) -> None:
    loads.num_routers = 10
    all_report(loads, 100, 1.0)
    loads.count("a", 3)
    all_report(loads, 100, 1.0)
    assert fitting(loads) == "bcde"


def test_rows_that_wait_keep_others_off(loads: Loads) -> None:
    loads.reported({"b": report(2, 1.0, queued_rows=1)}, 1.0)
    assert fitting(loads) == "acde"
    loads.reported({"b": report(2, 2.0)}, 2.0)
    assert fitting(loads) == "abcde"


def test_reports_stay_with_their_pairs_when_others_come_and_go(loads: Loads) -> None:
    all_report(loads, 80, 1.0, d=150)
    loads.present(("d", "b", "f"), {"f": 3})
    assert loads.fits().tolist() == [False, True, True]
    loads.reported({"gone": report(1000, 2.0), "b": {}}, 2.0)
    assert loads.fits().tolist() == [False, True, True]
    assert loads.among(["b"]).tolist() == [False, True, False]


def test_room_is_what_is_left_where_nobody_waits(loads: Loads) -> None:
    loads.num_routers = 10
    loads.reported({"a": report(4, 1.0), "b": report(8, 1.0), "c": report(9, 1.0, 1)}, 50.0)
    # Nothing is known of the others, but what this router has there: one row, of ten routers.
    loads.count("e", 1)
    assert loads.free(8).tolist() == [4.0, 0.0, 0.0, 8.0, 0.0]
    assert loads.queued() == 1.0
    assert [loads.queued_since("c", at) for at in (49.0, 50.0)] == [1.0, 0.0]
    assert not loads.queued_since("a", 49.0)
    assert not loads.queued_since("gone", 49.0)


def test_nothing_is_present() -> None:
    assert Loads().fits().tolist() == []
