"""What the figures of drafts count, on outputs written by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from benchmarks.auto import compared
from benchmarks.drafts import by_source, fresh_ones, outcome, per_pass, repeated, rows_of, whole
from benchmarks.side_by_side import ratio, spread
from benchmarks.tables import table
from twotower import GenerationResult
from twotower.sweep.metrics import Row

LOOP, FRESH = [1, 2] * 8, list(range(16))


def result(token_ids: list[int], **changes: Any) -> GenerationResult:
    plain = GenerationResult(
        token_ids, "", "length", 0, 1, 0, [], None, 0, 0, 0, [-1.0] * len(token_ids)
    )
    return dataclasses.replace(plain, **changes)


def row(token_ids: list[int], passes: int) -> Row:
    return Row(tuple(token_ids), "", "length", (-1.0,) * len(token_ids), 0, passes)


def test_repeated_4_grams() -> None:
    # 13 4-grams, of which the first two are new.
    assert repeated(LOOP) == pytest.approx(11 / 13)
    assert (repeated(FRESH), repeated([1])) == (0.0, 0.0)
    assert fresh_ones([result(LOOP), result(FRESH), result(LOOP)]) == [1]


def test_passes_that_read_the_prompt_do_not_count() -> None:
    [found] = rows_of([[7] * 3], [result(FRESH, nfe=2, context_passes=9)], None)
    assert (found.nfe, found.context_passes) == (2, 8)
    assert per_pass([found]) == 1.6
    assert per_pass([]) is None


def test_fresh_outputs_are_counted_by_themselves() -> None:
    rows = [row(LOOP, 4), row(FRESH, 16)]
    found = outcome(rows, [row(LOOP, 16), row([*FRESH[:-1], 3], 16)], [1])
    assert (found["all"], found["fresh"], found["equal"]) == (1.6, 1.0, 0.5)


def test_the_last_draft_counts_as_a_whole() -> None:
    # Of 18 tokens that were drawn the output has 16.
    results = [result(FRESH, context_passes=5, accepted_tokens=14, drafted_tokens=20)]
    assert whole(rows_of([[7]], results, None), results) == 4.5
    # An output that has ended by itself has no more tokens than it has.
    ended = [dataclasses.replace(results[0], finish_reason="stop")]
    assert whole(rows_of([[7]], ended, None), ended) == 4.0
    assert whole(rows_of([[7]], [result(FRESH)], None), [result(FRESH)]) is None


def test_drafts_by_source() -> None:
    counts = {
        "accepted_tokens": 9,
        "drafted_tokens": 30,
        "lookup_accepted_tokens": 7,
        "lookup_drafted_tokens": 15,
    }
    found = by_source([result(FRESH, **counts), result(FRESH)])
    assert found == {"lookup": [7, 15], "denoiser": [2, 15]}


def test_auto_is_held_against_the_best_choice_of_its_quality() -> None:
    rates = {"ar": 2.0, "any": 3.0, "lookup": 4.0, "denoiser": 1.0}
    rates |= {"any, mix": 5.0, "mask_diffusion": 1.0, "auto ar": 3.8, "auto fast": 4.0}
    found = compared({name: [rate, rate] for name, rate in rates.items()})["auto"]
    assert found["auto ar"] == {"best": "lookup", "over_best": ratio([3.8], [4.0])}
    assert found["auto fast"] == {"best": "any, mix", "over_best": ratio([4.0], [5.0])}


def test_ratios_are_of_the_same_round() -> None:
    found = ratio([2.0, 6.0, 3.0], [1.0, 2.0, 3.0])
    assert found == {"median": 2.0, "low": 1.0, "high": 3.0}
    assert spread(found) == "2.00 (1.00-3.00)"


def test_a_table_has_empty_cells() -> None:
    shown = table(("a", "b"), {"row": [1.25, None]}).splitlines()
    assert shown == ["|  | a | b |", "|---|---|---|", "| row | 1.250 |  |"]
