"""Rows in batches against themselves alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import pytest

from twotower.bench.decode import EnginePair, Run
from twotower.bench.invariance import MODES, differences, measure_invariance
from twotower.bench.options import BenchOptions
from twotower.bench.workbench import Workbench
from twotower.planner.floors import Ceilings
from twotower.towers.decoding.services import Block

OPTIONS = BenchOptions(batches=(2, 1), context=40, profiles=("loop",), long_context=40, long_rows=1)


@pytest.fixture(scope="module")
def bench() -> Iterator[Workbench]:
    bench = Workbench(OPTIONS, Ceilings(1e10, 1e10, 1e10))
    yield bench
    bench.close()


def block(tokens: Sequence[int], log_probs: Sequence[float]) -> list[Block]:
    count = len(tokens)
    ones = (1.0,) * count
    return [Block(0, tuple(tokens), (0,) * count, ones, nfe=1, log_probs=tuple(log_probs))]


def test_a_row_with_other_tokens_has_other_bits_too() -> None:
    alone = {0: block([1, 2], [-1.0, -2.0]), 1: block([3], [-1.0]), 2: block([4], [-1.0])}
    together = {
        0: block([1, 2], [-1.0, -2.0 + 2.0**-50]),
        1: block([5], [-1.0]),
        2: block([4], [-1.0]),
        3: block([6], [-1.0]),
    }
    found = differences(together, alone)
    assert found == {"compared": 3, "tokens_differ": 1 / 3, "bits_differ": 2 / 3}


@pytest.mark.parametrize("mode", MODES)
def test_on_a_cpu_nothing_differs(bench: Workbench, mode: str) -> None:
    entries = list(measure_invariance(bench, mode))  # type: ignore[arg-type]
    assert [entry["rows"] for entry in entries] == [1, 2]
    assert [entry["compared"] for entry in entries] == [1, 2]
    assert {entry["bits_differ"] for entry in entries} == {0.0}
    assert {(entry["mode"], entry["prompt"], entry["tokens"]) for entry in entries} == {
        (mode, 40, 32)
    }
    assert bench.pool.slots_used == 0


def test_what_differs_in_a_batch_is_found(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 1 gets other last bits beside row 0."""
    plain = EnginePair.generate

    def disturbed(
        pair: EnginePair, run: Run, prompts: Mapping[int, Sequence[int]]
    ) -> dict[int, list[Block]]:
        written = plain(pair, run, prompts)
        assert {row: sum(len(b.token_ids) for b in own) for row, own in written.items()} == (
            dict.fromkeys(prompts, 32)
        )
        if len(prompts) > 1:
            last = written[1][-1]
            moved = (*last.log_probs[:-1], last.log_probs[-1] * (1 + 2.0**-20))
            written[1][-1] = replace(last, log_probs=moved)
        return written

    monkeypatch.setattr(EnginePair, "generate", disturbed)
    shares = [
        (entry["rows"], entry["tokens_differ"], entry["bits_differ"])
        for entry in measure_invariance(bench, "ar")
    ]
    assert shares == [(1, 0.0, 0.0), (2, 0.0, 0.5)]


def test_the_option_reaches_both_towers() -> None:
    for wanted in (False, True):
        bench = Workbench(replace(OPTIONS, deterministic=wanted), Ceilings(1e10, 1e10, 1e10))
        assert (bench.context.deterministic, bench.denoiser.deterministic) == (wanted, wanted)
        bench.close()
