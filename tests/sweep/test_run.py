"""Sweeps of the shipped model, from prompts to files: resumed, repeated, and refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from twotower.sweep.command import sweep_to_folder
from twotower.sweep.grid import Grid
from twotower.sweep.report import markdown
from twotower.sweep.run import Sweep, SweepOptions, run_sweep
from twotower.towers.errors import InvalidRequestError

GRID = Grid(
    axes={
        "confidence_threshold": (0.5, 0.9),
        "steps_per_block": (2,),
        "block_size": (8,),
        "draft_steps": (1,),
    }
)
NAMES = [
    "ar",
    "verified, block 8, drafts 1",
    "threshold, block 8, threshold 0.5",
    "threshold, block 8, threshold 0.9",
    "steps, block 8, steps 2",
]
COSTS = {
    "source": "a test",
    "rows": 2,
    "ar_ms": 1.0,
    "block_ms": {"8": {"denoise": 1.0, "extend": 1.0, "verify": 1.0}},
}
CLOCKED = ("seconds", "tokens_per_s")
# In verified and auto measured times decide who drafts, and so these, but no token.
CHOSEN = (
    "nfe",
    "context_passes",
    "accepted_tokens",
    "drafted_tokens",
    "lookup_accepted_tokens",
    "lookup_drafted_tokens",
    "tokens_per_nfe",
    "tokens_per_pass",
    "fresh_tokens_per_pass",
)


@pytest.fixture
def options(tmp_path: Path) -> SweepOptions:
    prompts, costs = tmp_path / "prompts.txt", tmp_path / "costs.json"
    prompts.write_text("import os\n\ndef main():\n    return\n\nclass Queue:\n")
    costs.write_text(json.dumps(COSTS))
    return SweepOptions(prompts, tmp_path / "out", GRID, max_tokens=16, pass_costs=costs, batch=2)


def timeless(sweep: Sweep) -> list[dict[str, Any]]:
    return [repeatable(point) for point in sweep.points]


def repeatable(line: Mapping[str, Any]) -> dict[str, Any]:
    """A point, or a line of its outputs, without what depends on time."""
    chosen = CHOSEN if line.get("mode", "verified") == "verified" else ()
    return {name: value for name, value in line.items() if name not in (*CLOCKED, *chosen)}


def outputs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of all points' outputs, by file."""
    return {
        path.name: [repeatable(json.loads(line)) for line in path.read_text().splitlines()]
        for path in (folder / "outputs").iterdir()
    }


class InterruptedSweepError(Exception):
    pass


class Breaking:
    """A progress that fails when it is told of the point after `points` others."""

    def __init__(self, points: int) -> None:
        self.points = points

    def __call__(self, done: float, total: float | None, _note: str) -> None:
        if total is not None and done == self.points:
            raise InterruptedSweepError


def test_an_interrupted_sweep_goes_on(options: SweepOptions, tmp_path: Path) -> None:
    whole = run_sweep(replace(options, out=tmp_path / "whole"))
    assert [point["name"] for point in whole.points] == NAMES
    with pytest.raises(InterruptedSweepError):
        run_sweep(options, Breaking(3))
    path = options.out / "points.jsonl"
    before = path.read_text()
    assert len(before.splitlines()) == 3
    done: list[float] = []
    resumed = run_sweep(options, lambda now, total, _note: done.append(now) if total else None)
    assert done == [3, 4, 5]
    after = path.read_text()
    assert after.startswith(before)
    assert [json.loads(line)["name"] for line in after.splitlines()] == NAMES
    assert timeless(resumed) == timeless(whole)
    assert outputs(options.out) == outputs(tmp_path / "whole")


def test_what_the_figures_say(options: SweepOptions) -> None:
    sweep = run_sweep(options)
    points = {point["name"]: point for point in sweep.points}
    ar, verified = points["ar"], points["verified, block 8, drafts 1"]
    # The first token comes from the pass that reads the prompt.
    assert (ar["tokens"], ar["context_passes"], ar["nfe"]) == (48, 45, 0)
    for name in ("loss", "loss_low", "loss_high", "novel_loss"):
        assert ar[name] == verified[name] == 0.0
    assert ar["agreement"] == verified["agreement"] == verified["exact_share"] == 1.0
    # Whoever drafted: every token is drawn after a pass, and no pass gives none.
    assert verified["nfe"] <= verified["context_passes"]
    assert verified["accepted_tokens"] + verified["context_passes"] >= 45
    assert ar["regret"] == verified["regret"] == pytest.approx(0.0, abs=1e-6)
    steps = points["steps, block 8, steps 2"]
    # Two blocks of two passes a row, of which the first is read.
    assert (steps["nfe"], steps["context_passes"]) == (12, 3)
    assert steps["tokens_per_nfe"] == 4.0
    assert steps["loss"] > 1.0
    assert steps["regret"] > 1.0
    bold, careful = (points[f"threshold, block 8, threshold {value}"] for value in (0.5, 0.9))
    assert bold["nfe"] < careful["nfe"] <= 48
    assert (bold["confidence_threshold"], bold["steps_per_block"]) == (0.5, 8)


def test_draws_repeat_with_their_seed_and_verified_draws_ars_tokens(options: SweepOptions) -> None:
    warm = replace(options, temperature=1.0, grid=Grid(("verified",), axes=GRID.axes))
    first = {point["name"]: point for point in run_sweep(warm).points}
    kept = (options.out / "outputs" / "ar.jsonl").read_text()
    again = run_sweep(replace(warm, fresh=True))
    assert list(first) == ["ar greedy", *NAMES[:2]]
    assert timeless(again) == [repeatable(point) for point in first.values()]
    assert (options.out / "outputs" / "ar.jsonl").read_text() == kept
    written = [
        options.out / "outputs" / f"{name}.jsonl" for name in ("ar", "verified_block-8_drafts-1")
    ]
    tokens = [
        [json.loads(line)["token_ids"] for line in path.read_text().splitlines()]
        for path in written
    ]
    assert tokens[0] == tokens[1]
    assert first["ar"]["agreement"] < 1.0
    assert first["verified, block 8, drafts 1"]["loss"] == 0.0
    run_sweep(replace(warm, fresh=True, seed=5, grid=Grid(())))
    assert (options.out / "outputs" / "ar.jsonl").read_text() != kept


@pytest.mark.parametrize(
    ("change", "named"),
    [({"seed": 1}, "seed 0 there, 1 now"), ({"limit": 1}, "prompts 3 "), ({"batch": 3}, "batch 2")],
)
def test_another_sweep_is_refused_before_the_model_is_read(
    options: SweepOptions, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(InterruptedSweepError):
        run_sweep(options, Breaking(1))
    with pytest.raises(InvalidRequestError, match=named):
        run_sweep(replace(options, **change), Breaking(0))


def test_a_report_holds_every_point(options: SweepOptions) -> None:
    table = sweep_to_folder(options)
    with (options.out / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    report = json.loads((options.out / "sweep.json").read_text())
    assert [row["name"] for row in rows] == NAMES
    assert [point["name"] for point in report["points"]] == NAMES
    assert all(f"| {name} |" in table for name in NAMES)
    assert report["pass_costs"] == COSTS
    assert report["settings"]["max_tokens"] == 16
    steps, ar = report["points"][-1], report["points"][0]
    # Every pass costs 1 ms: ar has 45 for as many tokens as these 15.
    assert ar["speedup"] == 1.0
    assert steps["speedup"] == pytest.approx(3.0)
    assert float(rows[-1]["speedup"]) == pytest.approx(3.0)
    assert rows[0]["nfe"] == "0"
    assert rows[0]["tokens_per_nfe"] == ""
    picture = (options.out / "sweep.svg").read_text()
    assert "<svg" in picture
    # A marker for each of five points in both panels, and the published one.
    assert picture.count('id="PathCollection') + picture.count("<use ") > 11
    # Once more from what is there: the same files, and nothing is decoded.
    assert sweep_to_folder(options, Breaking(0)) == table
    assert (options.out / "sweep.svg").read_text() == picture


def test_costs_are_measured_once(options: SweepOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twotower.sweep.costs._ROUNDS", 1)
    alone = replace(options, pass_costs=None, grid=Grid((), axes=GRID.axes))
    first = run_sweep(alone)
    assert first.costs.rows == 2
    assert set(first.costs.blocks) == {16}
    monkeypatch.setattr("twotower.sweep.run.measure", Breaking(0))
    assert run_sweep(alone).costs == first.costs
    assert "measured here" in markdown(first)
