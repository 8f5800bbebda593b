"""Costs of passes: read, measured, and what a point's speed-up is at them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from twotower.sweep import costs
from twotower.sweep.costs import Bench, PassCosts, measure, read_costs
from twotower.towers.engine.context_engine import ContextEngine
from twotower.towers.engine.denoiser_engine import DenoiserEngine
from twotower.towers.errors import InvalidRequestError
from twotower.towers.state.pages import PAGE_TOKENS

AR = {"mode": "ar", "block_size": None, "tokens": 64, "nfe": 0, "context_passes": 64}
KNOWN = PassCosts("a test", 16, 10.0, {16: {"denoise": 20.0, "extend": 15.0, "verify": 30.0}})


def point(
    mode: str, block_size: int, nfe: int, context_passes: int, drafted: int = 0
) -> dict[str, Any]:
    return {
        "mode": mode,
        "block_size": block_size,
        "tokens": 64,
        "nfe": nfe,
        "context_passes": context_passes,
        "drafted_tokens": drafted,
    }


def test_speedup_by_hand() -> None:
    """ar takes 640 ms for its 64 tokens."""
    assert KNOWN.speedup(AR, AR) == 1.0
    # 20 passes of 20 ms and 4 extensions of 15.
    assert KNOWN.speedup(point("mask_diffusion", 16, 20, 4), AR) == pytest.approx(640 / 460)
    # 10 drafts of 20 ms and as many checks of 30, each of the last token and 15 drafted ones.
    checked = point("verified", 16, 10, 10, 150)
    assert KNOWN.speedup(checked, AR) == pytest.approx(640 / 500)


def test_a_check_costs_what_its_length_says() -> None:
    """A step is 10 ms, and every drafted token (30 - 10) / 15 ms more."""
    lookups = PassCosts("a test", 16, 10.0, {16: {"verify": 30.0}})
    # 8 steps and 12 lookups of 3 tokens, without a pass of the denoiser.
    assert lookups.speedup(point("verified", 16, 0, 20, 36), AR) == pytest.approx(640 / 248)
    # All of them steps: 64 passes are those of ar.
    assert lookups.speedup(point("auto", 16, 0, 64, 0), AR) == pytest.approx(1.0)
    # 4 drafts of the denoiser among 10 rounds, of which 3 were lookups of 7 tokens and 3 steps.
    mixed = point("auto", 16, 4, 10, 4 * 15 + 3 * 7)
    assert KNOWN.speedup(mixed, AR) == pytest.approx(
        640 / (80 + 4 * 30 + 3 * 10 + 3 * (10 + 28 / 3))
    )


def test_no_speedup_where_a_pass_was_not_measured() -> None:
    assert KNOWN.speedup(point("mask_diffusion", 8, 20, 4), AR) is None
    assert KNOWN.speedup(point("mock_ar", 16, 64, 64), AR) is None
    undrafted = PassCosts("a test", 16, 10.0, {16: {"verify": 30.0}})
    assert undrafted.speedup(point("verified", 16, 10, 10, 150), AR) is None
    unchecked = PassCosts("a test", 16, 10.0, {16: {"denoise": 20.0, "extend": 15.0}})
    assert unchecked.speedup(point("verified", 16, 10, 10), AR) is None


def test_costs_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(KNOWN.to_dict()))
    assert read_costs(path, 16) == KNOWN


def test_a_bench_report_at_the_nearest_number_of_rows(tmp_path: Path) -> None:
    def entry(rows: int, *passes: tuple[str, float, float]) -> dict[str, Any]:
        named = [{"kind": kind, "rows_a_pass": each, "ms": ms} for kind, each, ms in passes]
        return {"rows": rows, "passes": named}

    report = {
        "date": "2026-11-26",
        "hardware": {"device": "NVIDIA H200"},
        "options": {"block": 16},
        "decode": [
            entry(1, ("ar", 1.0, 3.0)),
            entry(16, ("ar", 16.0, 9.8)),
            entry(16, ("denoise", 16.0, 19.0), ("extend", 16.0, 25.0)),
            entry(16, ("denoise", 16.0, 21.0), ("extend", 16.0, 27.0)),
            # Out of step: passes of fewer rows.
            entry(16, ("denoise", 9.5, 12.0), ("extend", 1.5, 14.0)),
            entry(64, ("ar", 64.0, 18.0)),
        ],
    }
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(report))
    found = read_costs(path, 20)
    assert (found.rows, found.ar) == (16, 9.8)
    assert found.blocks == {16: {"denoise": 20.0, "extend": 26.0}}
    assert found.source == "bench.json: NVIDIA H200, 2026-11-26"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"decode": []}', '{"ar_ms": 1}'])
def test_other_files_are_no_costs(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(
        InvalidRequestError, match=r"pass_costs: got 'other.json', expected a report"
    ):
        read_costs(path, 16)


def test_passes_are_timed_on_the_models_own_towers(
    engines: tuple[ContextEngine, DenoiserEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "_ROUNDS", 1)
    told: list[str] = []
    bench = Bench(engines[0].tower, engines[1].tower, 2, PAGE_TOKENS)
    # The drafts of 32 need a page more than the blocks do.
    found = measure(bench, [3, 32, 32], "here", told.append)
    assert (found.source, found.rows) == ("here", 2)
    assert found.ar > 0.0
    assert set(found.blocks) == {3, 32}
    for ms in found.blocks.values():
        assert set(ms) == {"denoise", "extend", "verify"}
        assert all(value > 0.0 for value in ms.values())
    assert set(told) == {"pass costs, round 1 of 1"}
