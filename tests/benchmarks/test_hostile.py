"""What the hostile run calls a fault, and what it draws."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict

from benchmarks.hostile import (
    Figures,
    blamed,
    held,
    kinds_table,
    requirements,
    requirements_table,
)
from benchmarks.hostile_neighbour import Reading
from benchmarks.hostile_values import BASES, damaged, json_body, nested, spoil
from benchmarks.hostile_wire import KINDS
from twotower.protos.v1 import generation_pb2 as pb

PIDS = {"router": [1], "proxy": [2]}


def figures(**changed: Any) -> Figures:
    """Of a run in which all went well, but for what is changed."""
    readings = [Reading(0.0, front, 0.1, 0.4, "") for front in ("http", "grpc")]
    good = Figures(
        outcomes={"http: a": Counter({"400": 3, "closed": 1}), "grpc: b": Counter(OK=2)},
        pids=[PIDS, PIDS],
        rss_mib=[{"router 1": 100.0}, {"router 1": 101.0}],
        alone=readings,
        beside=[replace(each, first_s=0.2, whole_s=0.8) for each in readings],
    )
    return replace(good, **changed)


def failed(found: Figures) -> list[str]:
    return [each.name for each in requirements(found) if not each.holds]


def test_a_good_run_has_no_fault() -> None:
    assert failed(figures()) == []
    assert "| http: a | 4 | 400 3, closed 1 |" in kinds_table(figures())
    assert "NO" not in requirements_table(requirements(figures()))


SLOW = [Reading(0.0, "http", 0.1, 0.9, ""), Reading(0.0, "grpc", 0.1, 0.4, "")]
WRONG = [Reading(0.0, "http", 0.1, 0.4, "wrong tokens"), SLOW[1]]


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"pids": [PIDS, {**PIDS, "router": [3]}]}, "every process lives on"),
        ({"outcomes": {"a": Counter({"503": 1})}}, "no status that blames the service"),
        ({"left": {"context rows": 1.0}}, "nothing is left"),
        ({"rss_mib": [{"router 1": 1.0}, {"router 1": 99.0}]}, "memory of each process"),
        ({"beside": WRONG}, "the neighbour's tokens are right"),
        ({"beside": SLOW}, "p99 of the neighbour's completion by http"),
    ],
)
def test_each_fault_is_found(changed: dict[str, Any], fault: str) -> None:
    [found] = failed(figures(**changed))
    assert found.startswith(fault)


@pytest.mark.parametrize(
    "outcome", ["500", "503", "INTERNAL", "UNAVAILABLE", "no answer", "400 in another shape"]
)
def test_outcomes_that_blame_the_service(outcome: str) -> None:
    assert blamed(outcome)


@pytest.mark.parametrize("outcome", ["200", "400", "OK", "CANCELLED", "closed", "silence"])
def test_outcomes_that_do_not(outcome: str) -> None:
    assert not blamed(outcome)


def test_rows_and_places_are_held_and_cached_pages_are_not() -> None:
    towers = {"context": {"rows": 0, "slots_used": 2, "pages_used": 7}, "denoiser": {"mirrors": 1}}
    stats = {"router": {"running": 1, "waiting": 0}, "pairs": [{"towers": towers}]}
    assert held(stats) == {"router running": 1, "context slots_used": 2, "denoiser mirrors": 1}


def test_values_are_the_same_for_the_same_seed() -> None:
    def drawn(seed: int) -> list[Any]:
        draw, message = random.Random(seed), pb.GenerateRequest(text="a")
        spoil(draw, message)
        bodies = [json_body(draw, path) for path in BASES]
        return [*bodies, nested(draw), damaged(draw, b"abc"), MessageToDict(message)]

    assert drawn(1) == drawn(1) != drawn(2)


def test_most_drawn_bodies_are_wrong_and_some_are_no_json() -> None:
    draw, parsed = random.Random(0), 0
    for _ in range(200):
        try:
            json.loads(json_body(draw, "/v1/completions"))
            parsed += 1
        except ValueError:
            pass
    assert 100 < parsed < 200


def test_kinds_of_both_fronts_are_registered() -> None:
    fronts = Counter(name.partition(":")[0] for name in KINDS)
    assert set(fronts) == {"http", "grpc"}
    assert min(fronts.values()) >= 15
