"""The workbench: floors, routing and memory that all measurements share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from twotower.bench.options import BenchOptions
from twotower.bench.workbench import Workbench
from twotower.planner.shapes import TINY


@pytest.fixture(scope="module")
def bench() -> Iterator[Workbench]:
    made = Workbench(BenchOptions(batches=(1, 6), unique=6.0, profiles=(), long_rows=2))
    yield made
    made.close()


def test_experts_between_measured_batches_lie_on_a_line(bench: Workbench) -> None:
    four, eight = bench.unique("ar", 4), bench.unique("ar", 8)
    assert bench.unique("ar", 1) == TINY.num_experts_per_tok < four < eight
    # Six is a batch of its own, seven is not.
    assert bench.unique("ar", 7) == pytest.approx(four + 0.75 * (eight - four))
    assert bench.unique("ar", 6) * 2 == pytest.approx(round(bench.unique("ar", 6) * 2))


def test_steering_is_for_so_many_rows(bench: Workbench) -> None:
    bench.steer(1)
    assert bench.open_experts < TINY.n_routed_experts
    assert bench.unique("denoise", 1) == pytest.approx(6.0, abs=2.0)
    # Six rows that choose independently read nearly all, so all are open.
    bench.steer(6)
    assert bench.open_experts == TINY.n_routed_experts
    assert bench.unique("denoise", 6) > 10


def test_a_floor_counts_the_experts_and_the_context_that_there_are(bench: Workbench) -> None:
    short, long = bench.floor("extend", 1), bench.floor("extend", 1, 4096)
    assert short.unique == long.unique == bench.unique("extend", 1)
    token = 2 * TINY.num_key_value_heads * TINY.head_dim * 4
    assert long.num_bytes - short.num_bytes == pytest.approx((4096 - 128) * token)
    assert long.seconds > short.seconds
    half = bench.floor("denoise", 6, masked=0.5)
    assert half.num_bytes < bench.floor("denoise", 6).num_bytes


def test_every_measured_row_fits_into_the_pool(bench: Workbench) -> None:
    assert bench.pool.slots.num_slots == 6
    assert bench.pool.could_ever_hold(bench.options.long_context + 16)
