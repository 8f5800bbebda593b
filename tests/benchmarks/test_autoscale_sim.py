"""The simulator against arithmetic: queues, shares and times that are known beforehand."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.autoscale_sim import (
    Figures,
    Load,
    Policy,
    compare,
    fixed,
    flaps,
    read_requests,
    replay,
    spread,
    target_only,
)
from twotower.deployments.pair.autoscaling import PairAutoscaling, PairScaling, Tick

STEP_S = 0.5
# A row's block takes a second whatever runs beside it.
PLAIN = Figures(slots=4, queue=100, block_s=1.0, row_block_s=0.0, start_s=10.0)
OPTIONS = PairAutoscaling(max_pairs=20, target_rows_per_pair=3.0)


def given(*requests: tuple[float, float]) -> Load:
    """Requests of so many blocks at their times."""
    return Load(lambda _: 0.0, requests=tuple((at, 16 * blocks) for at, blocks in requests))


def run(load: Load, policy: Policy, figures: Figures = PLAIN, **kwargs: Any) -> dict[str, Any]:
    return replay(load, policy, figures, OPTIONS, step_s=STEP_S, **kwargs)


def test_a_row_takes_its_blocks_and_the_next_waits_for_a_slot() -> None:
    one_slot = Figures(slots=1, queue=9, block_s=1.0, row_block_s=0.0)
    found = run(given((0.1, 6), (0.2, 4), (0.3, 2)), fixed(1), one_slot, seconds=60)
    # 6 s, then 4 behind 6, then 2 behind 10: each exact to a step for every row before it.
    assert found["requests"] == 3
    assert found["request_s"]["p50"] == pytest.approx(10, abs=3 * STEP_S)
    assert found["request_s"]["p99"] == pytest.approx(12, abs=3 * STEP_S)
    assert found["wait_s"]["p99"] == pytest.approx(10, abs=3 * STEP_S)
    assert (found["refused"], found["ups"], found["downs"]) == (0, 0, 0)


def test_rows_of_a_pair_slow_each_other() -> None:
    shared = Figures(slots=10, queue=9, block_s=1.0, row_block_s=0.5)
    alone = run(given((0.1, 10)), fixed(1), shared, seconds=60)
    eight = run(given(*[(0.1, 10)] * 8), fixed(1), shared, seconds=100)
    assert alone["request_s"]["p50"] == pytest.approx(15, abs=1)
    assert eight["request_s"]["p50"] == pytest.approx(50, abs=1)


def test_more_than_fits_is_refused() -> None:
    tight = Figures(slots=2, queue=3, block_s=1.0, row_block_s=0.0)
    found = run(given(*[(0.1, 50)] * 9), fixed(1), tight, seconds=300)
    assert (found["requests"], found["refused"]) == (9, 6)


def test_a_pair_meets_the_queue_of_the_textbook() -> None:
    """Erlang's C: of ten servers, 80 % busy, 41 % of the requests wait, exponentially long."""
    # Blocks so small that their number is all but continuous: 10 s of work on average.
    ten = Figures(slots=10, queue=1000, block_s=0.001, row_block_s=0.0)
    load = Load(lambda _: 0.8, mean_tokens=16 * 10_000)
    found = run(load, fixed(1), ten, seconds=15_000)
    work = 10 * 0.8
    tail = work**10 / math.factorial(10) / (1 - 0.8)
    waits = tail / (sum(work**k / math.factorial(k) for k in range(10)) + tail)
    assert found["wait_s"]["p50"] == 0
    assert found["wait_s"]["p99"] == pytest.approx(math.log(waits / 0.01) / (1.0 - 0.8), rel=0.15)


def test_pairs_start_late_and_go_after_their_rows() -> None:
    def script(tick: Tick) -> int:
        """Two pairs from the third second on, one from the twentieth."""
        return 2 if 3 <= tick.time < 20 else 1

    # Eight rows for one pair of four slots; the second pair is up too late for those that wait.
    # Of eight more it gets six, and two of these wait for the end of the others.
    found = run(given(*[(0.1, 8)] * 8, *[(15.0, 30)] * 8), script, seconds=100)
    assert (found["ups"], found["downs"], found["flaps"]) == (1, 1, 1)
    assert found["wait_s"]["p99"] == pytest.approx(30, abs=2 * STEP_S)
    # One pair all the time, the other from second 4 to the end of its rows.
    assert found["pair_hours"] * 3600 == pytest.approx(100 + 15 + 60 - 4, abs=5)
    assert found["requests"] == 16


def test_requests_wait_in_the_router_while_there_is_no_pair() -> None:
    figures = Figures(
        slots=4,
        block_s=1.0,
        row_block_s=0.0,
        start_s=10.0,
        cold_start_queue=5,
        cold_start_timeout_s=30.0,
    )
    options = PairAutoscaling(
        min_pairs=0, max_pairs=3, target_rows_per_pair=24.0, metrics_interval_s=1.0
    )
    arrivals = given(*[(20.0, 2)] * 7)
    found = replay(
        arrivals,
        PairScaling(options).pairs_for,
        figures,
        options,
        seconds=60,
        step_s=0.5,
        first_pairs=0,
    )
    assert (found["refused"], found["ups"]) == (2, 1)
    # What it takes to hear of them and to start.
    assert found["wait_s"]["p50"] == pytest.approx(11.5, abs=1.5)
    slow = Figures(**{**vars(figures), "cold_start_timeout_s": 5.0})
    found = replay(
        arrivals,
        PairScaling(options).pairs_for,
        slow,
        options,
        seconds=60,
        step_s=0.5,
        first_pairs=0,
    )
    assert found["refused"] == 7


@pytest.mark.parametrize("count", [0, 1, 5, 17, 40, 1000])
def test_requests_go_to_the_least_loaded(count: int) -> None:
    loads = np.array([3, 0, 7, 7, 2, 12])
    expected, most = loads.copy(), 12
    for _ in range(count):
        least = int(expected.argmin())
        if expected[least] < most:
            expected[least] += 1
    assert sorted(loads + spread(loads, count, most)) == sorted(expected)


def test_our_policy_flaps_less_and_refuses_less_than_the_target_alone() -> None:
    load = Load(lambda at: 10.0 if at % 60 < 30 else 1.0, mean_tokens=64.0)
    found = compare(load, PLAIN, OPTIONS, seconds=1800.0, step_s=STEP_S, seed=1)
    ours, alone = found["ours"], found["target_only"]
    assert ours["flaps"] <= 2 < 20 < alone["flaps"]
    assert ours["refused"] < alone["refused"]
    assert ours["requests"] == alone["requests"] == found["fixed_most"]["requests"]
    assert found["fixed_average"]["pair_hours"] == pytest.approx(ours["pair_hours"], rel=0.1)
    assert found == compare(load, PLAIN, OPTIONS, seconds=1800.0, step_s=STEP_S, seed=1)


def test_the_target_alone_counts_requests() -> None:
    policy = target_only(OPTIONS)
    asked = [policy(Tick(0, 1, [], requests, 0)) for requests in (0, 1, 3, 4, 10**6)]
    assert asked == [1, 1, 1, 2, 20]


def test_flaps_are_turns_in_a_short_time() -> None:
    assert flaps([]) == flaps([(0, 2), (5, 1), (900, -1), (950, -2)]) == 0
    assert flaps([(0, 2), (5, -1), (10, -1), (20, 3), (900, -1)]) == 2


def test_a_thousand_pairs_for_minutes_take_seconds() -> None:
    options = PairAutoscaling(min_pairs=900, max_pairs=1000, target_rows_per_pair=48.0)
    load = Load(lambda _: 16000.0)
    begin = time.perf_counter()
    found = replay(load, PairScaling(options).pairs_for, Figures(), options, seconds=60, step_s=0.5)
    assert found["requests"] == pytest.approx(960_000, rel=0.01)
    assert time.perf_counter() - begin < 20


def test_a_file_of_requests(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text('{"at": 3.5, "tokens": 160}\n{"at": 0, "tokens": 1}\n')
    command = [sys.executable, "-m", "benchmarks.autoscale_sim", str(path), "--hours", "0.02"]
    done = subprocess.run(
        [*command, "--max-pairs", "2", "--min-pairs", "1"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    printed = json.loads(done.stdout)
    assert {policy["requests"] for policy in printed["policies"].values()} == {2}
    for wrong in ('{"at": 1}', "[]", '{"at": -1, "tokens": 2}', '{"at": NaN, "tokens": 2}', "x"):
        path.write_text(wrong)
        with pytest.raises(ValueError, match=r"requests\.jsonl:1"):
            list(read_requests(path))
