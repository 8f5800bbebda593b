"""Passes on their own."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NoReturn

import pytest
import torch

from twotower.bench.options import BenchOptions
from twotower.bench.single_passes import measure_attention, measure_baseline, measure_breakdown
from twotower.bench.workbench import Workbench


@pytest.fixture(scope="module")
def bench() -> Iterator[Workbench]:
    options = BenchOptions(
        dtype="bfloat16", batches=(1, 2), compiled=True, long_context=512, long_rows=2, profiles=()
    )
    made = Workbench(options)
    yield made
    made.close()


def test_the_better_plain_form_is_what_we_are_compared_with(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    entry = measure_baseline(bench, "denoise", 2, ours=0.001)
    assert entry["errors"] == {}
    best = min(entry["eager_ms"], entry["compiled_ms"])
    assert entry["speedup"] == pytest.approx(best / 1.0)
    assert entry["unique_experts"] == bench.unique("denoise", 2)


def test_a_compiler_that_gives_up_is_named(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", refuse)
    entry = measure_baseline(bench, "ar", 1, ours=0.002)
    assert entry["errors"] == {"compiled": "RuntimeError: no compiler here"}
    assert entry["speedup"] == pytest.approx(entry["eager_ms"] / 2.0)
    assert bench.pool.slots_used == 0


def test_attention_is_a_part_of_a_pass(bench: Workbench) -> None:
    entry = measure_attention(bench, 2)
    assert [line["context"] for line in entry["contexts"]] == [64, 128, 256, 512]
    for line in entry["contexts"]:
        assert 0 < line["attention_ms"] < line["operators_ms"]
    assert entry["share_of_pass"] > 0
    assert entry["share_of_floor"] > 0
    assert entry["growth_of_context"] == 8


def test_a_breakdown_has_a_floor_for_what_it_names(bench: Workbench) -> None:
    entry = measure_breakdown(bench, "denoise", 2)
    by_name = {own["name"]: own for own in entry["operators"]}
    for name in (
        "in_proj",
        "out_proj",
        "attention",
        "route",
        "slot_outputs",
        "qkv",
        "o_proj",
        "head",
    ):
        own = by_name[name]
        assert own["share_of_floor"] == pytest.approx(own["floor_us"] / own["us"])
