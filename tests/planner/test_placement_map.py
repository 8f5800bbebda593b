"""The map of placements against single estimates, hand calculation, and the committed page."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from twotower.cli.main import app
from twotower.planner.estimates import Estimator
from twotower.planner.measured import MeasuredPasses, by_format, read_all
from twotower.planner.passes import Reached
from twotower.planner.placement_map import (
    LINES,
    MODES,
    Cell,
    PlacementMap,
    known_points,
    make_map,
)
from twotower.planner.plan import make_plan
from twotower.planner.question import Experts, Question
from twotower.planner.schedules import BLOCK
from twotower.planner.shapes import LARGE
from twotower.towers.errors import ConfigError

ROOT = Path(__file__).parents[2]
REPORTS = ROOT / "benchmarks" / "results" / "h200-2026-11-27"
FULL: tuple[Experts, ...] = ("full",)


def constant(ar: float, denoise: float, extend: float) -> MeasuredPasses:
    """Passes of one row, in seconds."""
    seconds = {"ar": [(1.0, ar)], "denoise": [(1.0, denoise)], "extend": [(1.0, extend)]}
    return MeasuredPasses("a test", 4096, seconds, fp8=False)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ar", "denoise", "extend"), [(0.003, 0.006, 0.009), (0.004, 0.006, 0.006), (0.005, 0.02, 0.01)]
)
def test_one_row_breaks_even_where_the_arithmetic_says(
    ar: float, denoise: float, extend: float
) -> None:
    """A block takes n denoiser passes and an extension, or 16 AR steps: n = (16 ar - e) / d."""
    question = Question("h200", experts=FULL, most_denoisers=1)
    measured = [constant(ar, denoise, extend)]
    found = make_map(question, (1, 2), (1.0, 2.0, 4.0, 8.0, 16.0), measured=measured)
    even = found.panels[0].crossing("colocated = ar", 0)
    assert even.tokens == pytest.approx(BLOCK / ((16 * ar - extend) / denoise), rel=0.01)


def test_two_gpus_need_half_the_passes() -> None:
    """A row alone never keeps both GPUs busy, so 1:1 takes as long a block, on twice the GPUs; its
    blocks' updates cost a little more."""
    question = Question("h200", experts=FULL, most_denoisers=1)
    panel = make_map(
        question, (1, 2), (1.0, 2.0, 4.0, 8.0), measured=[constant(0.004, 0.006, 0.006)]
    ).panels[0]
    even = panel.crossing("1:1 = ar", 0).tokens
    assert even == pytest.approx(BLOCK / ((8 * 0.004 - 0.006) / 0.006), rel=0.03)
    assert panel.crossing("colocated = 1:1", 0).says == "always"


def test_verified_breaks_even_at_its_cycle_over_an_ar_step() -> None:
    seconds = {"ar": [(1.0, 0.004)], "denoise": [(1.0, 0.006)], "verify": [(1.0, 0.008)]}
    known = MeasuredPasses("a test", 4096, seconds, fp8=False, cycles=[(1.0, 1.5)])  # type: ignore[arg-type]
    question = Question("h200", experts=FULL, most_denoisers=1)
    panel = make_map(question, (1, 2), (1.0, 3.0, 8.0), measured=[known]).panels[0]
    assert panel.crossing("verified = ar", 0).tokens == pytest.approx(1.5 * 14 / 4)


def test_two_towers_have_to_beat_lookups_too() -> None:
    """An AR step of 4 ms, a check of a block of 4 ms as well: 4 tokens a round are as many a pass.
    A block takes n denoiser passes of 6 ms and an extension of 6, or 4 rounds."""
    seconds = {
        "ar": [(1.0, 0.004)],
        "denoise": [(1.0, 0.002)],
        "extend": [(1.0, 0.006)],
        "verify": [(1.0, 0.004)],
    }
    known = MeasuredPasses("a test", 4096, seconds, fp8=False)  # type: ignore[arg-type]
    question = Question("h200", experts=FULL, most_denoisers=1, lookup_tokens=4.0)
    panel = make_map(question, (1, 2), (1.0, 2.0, 4.0, 8.0), measured=[known]).panels[0]
    assert panel.speed("lookup", 0, 3.0) == pytest.approx(4 / 0.004)
    colocated = panel.crossing("diffusion = lookups", 0).tokens
    assert colocated == pytest.approx(16 / ((16 - 6) / 2), rel=0.01)
    # A cycle of 6 ms against a round of 4 with 4 tokens.
    assert panel.crossing("verified = lookups", 0).tokens == pytest.approx(6.0)
    # A check that costs an AR step pays from the first accepted token on.
    assert panel.lookups(0).tokens == pytest.approx(1.0, abs=1e-6)


@cache
def small(
    gpu: str = "h200", context: int = 4096, most: int = 3, most_rows: int = 48
) -> PlacementMap:
    question = Question(gpu, context=context, most_denoisers=most)
    return make_map(question, (1, 8, most_rows), (1.5, 2.5, 4.0))


@pytest.mark.parametrize("row", [0, 1, 2])
@pytest.mark.parametrize("column", [0, 1, 2])
def test_a_cell_is_the_best_of_a_plan(row: int, column: int) -> None:
    """The same cell from `twotower plan`."""
    found = small()
    tokens, batch = found.panels[0].tokens[row], found.panels[0].batches[column]
    question = Question("h200", batch=batch, tokens_per_nfe=tokens, most_denoisers=3)
    plan = make_plan(replace(question, cycle_tokens=tokens))
    for panel in found.panels:
        cell = panel.cells[row][column]
        estimates = [own for own in plan.estimates if own.fits and own.experts == panel.experts]
        best = max(estimates, key=lambda own: own.per_gpu)
        assert cell.best is not None
        assert cell.per_gpu(cell.best) == pytest.approx(best.per_gpu)
        assert cell.fastest[cell.best].name == best.name
        pairs = [own.per_gpu for own in estimates if own.name in ("1:2", "1:3")]
        assert cell.per_gpu("1:N") == pytest.approx(max(pairs, default=0.0))
        # What is drawn at the cell's own place.
        drawn = panel.fastest(MODES, column, tokens)
        assert drawn == cell.best


def test_speeds_between_cells_are_nearly_those_of_estimates() -> None:
    panel = small().panels[0]
    for batch, column in ((1, 0), (8, 1)):
        own = Estimator(Question("h200"), LARGE, "full", None, Reached()).at(batch, 2.8)
        assert panel.speed("colocated", column, 2.8) == pytest.approx(
            own.colocated().per_gpu, rel=0.05
        )
        assert panel.speed("ar", column, 2.8) == pytest.approx(own.ar().per_gpu)


def test_cells_in_which_nothing_fits() -> None:
    """256 rows of 64 K tokens are 109 GB of states on an H100 of 80."""
    found = small("h100", 65536, 1, 256)
    for panel in found.panels:
        column = [row[2] for row in panel.cells]
        assert [cell.best for cell in column] == [None] * 3
        assert panel.cells[0][0].best == "lookup"
        assert all(panel.crossing(line, 2).says == "does not fit" for line in LINES)
        assert panel.fastest(("ar", "colocated"), 2, 3.0) is None
    # Both towers in bf16 are 126 GB.
    assert "colocated" not in found.panels[0].cells[0][0].fastest
    assert "colocated" in found.panels[1].cells[0][0].fastest


def test_an_empty_cell_has_no_best() -> None:
    assert Cell({}).best is None


@pytest.mark.parametrize(
    ("batches", "tokens", "named"),
    [
        ((), (1.0, 2.0), "batches: got nothing, expected ascending"),
        ((4, 4), (1.0, 2.0), "batches: got 4,4"),
        ((0, 4), (1.0, 2.0), "batches: got 0,4, expected at least 1"),
        ((1, 4), (0.5, 2.0), "tokens_per_pass: got 0.5,2, expected 1 to 16"),
        ((1, 4), (1.0, 17.0), "tokens_per_pass: got 1,17"),
        ((1, 4), (1.0, float("nan")), "tokens_per_pass: got 1,nan"),
    ],
)
def test_other_axes_are_refused(
    batches: tuple[int, ...], tokens: tuple[float, ...], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        make_map(Question("h200"), batches, tokens)


def test_known_points() -> None:
    tokens = {point.name: point.tokens for point in known_points()}
    assert tokens["plain"] == 1.32
    assert tokens["code"] == 2.35
    # 5.6 denoiser passes a block and one extension, each an AR step.
    assert tokens["published 2.42x"] == pytest.approx(2.85, abs=0.005)
    of = {point.name: point.decoding for point in known_points()}
    assert (of["code"], of["drafts, own"], of["lookups, greedy"]) == (
        "mask_diffusion",
        "verified",
        "lookup",
    )


ROUNDS = "lookups = ar, tokens a round"


def committed() -> list[tuple[Experts, str, int, float]]:
    """Format, line, rows and tokens per pass of the break-even tables of docs/placements.md."""
    found: list[tuple[Experts, str, int, float]] = []
    experts: Experts = "full"
    for line in (ROOT / "docs" / "placements.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] in ("bf16", "8-bit experts", "either format, the faster of each"):
            experts = "fp8" if cells[0] == "8-bit experts" else "full"
            skipped = cells[0].startswith("either")
        if cells[0] in (*LINES, ROUNDS) and not skipped:
            for rows, text in zip((1, 16, 64, 128), cells[1:], strict=True):
                if re.fullmatch(r"\d+\.\d+", text):
                    found.append((experts, cells[0], rows, float(text)))
    return found


@cache
def reports() -> tuple[MeasuredPasses, ...]:
    return tuple(read_all([REPORTS], LARGE, Question("h200")))


def many_simulations(line: str, rows: int) -> bool:
    return line in ("1:N = ar", "diffusion = ar", "diffusion = lookups") and rows != 16


@pytest.mark.parametrize(
    ("experts", "line", "rows", "tokens"),
    [
        # Simulations of many rows, or of long ones, with up to seven denoisers take seconds.
        pytest.param(*case, marks=[pytest.mark.slow] if many_simulations(*case[1:3]) else [])
        for case in committed()
    ],
)
def test_committed_reports_give_the_committed_table(
    experts: Experts, line: str, rows: int, tokens: float
) -> None:
    """From the two cells of the map between which the number lies."""
    # One more cell, for numbers that were rounded to a cell's.
    low = math.floor(2 * tokens - 0.01) / 2
    question = Question("h200", experts=(experts,), most_denoisers=7 if "N" in line else 1)
    if line.startswith("diffusion"):
        question = Question("h200", experts=(experts,))
    panel = make_map(question, (rows,), (low, low + 0.5, low + 1), measured=reports()).panels[0]
    found = panel.lookups(0) if line == ROUNDS else panel.crossing(line, 0)
    assert found.tokens == pytest.approx(tokens, rel=0.01)


@pytest.mark.parametrize(
    ("rows", "tokens"),
    [
        (rows, at)
        for own, line, rows, at in committed()
        if own == "full" and line == "colocated = ar"
    ],
)
def test_both_sides_are_equal_at_the_committed_number(rows: int, tokens: float) -> None:
    """Within the scatter of the simulation, without the map's interpolation."""
    known = by_format(reports())["full"]
    own = Estimator(Question("h200"), LARGE, "full", known, Reached()).at(rows, tokens)
    assert own.colocated().per_gpu == pytest.approx(own.ar().per_gpu, rel=0.03)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["plan", *arguments])


SMALL = ["--batches", "1,150", "--tokens-per-pass", "7,8", "--most-denoisers", "1"]


def test_the_command_draws_and_prints(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "map.svg"
    known = ["--measured", str(REPORTS), "--gpu", "h200"]
    shown = run("--map", str(picture), *SMALL, *known)
    assert shown.exit_code == 0, shown.output
    for word in (
        "8-bit experts",
        "measured",
        "beyond",
        "datasheet",
        "assumed",
        "verified = ar",
        "lookups = ar",
    ):
        assert word in shown.stdout
    assert "<svg" in picture.read_text()[:1000]
    first = picture.read_bytes()
    body = json.loads(run("--map", str(picture), *SMALL, *known, "--json").stdout)
    assert picture.read_bytes() == first
    full, fp8 = body["panels"]
    assert (full["experts"], fp8["experts"]) == ("full", "fp8")
    assert full["passes"]["ar"] == ["measured", "beyond"]
    assert full["tokens_per_s_per_gpu"]["colocated"][0][1] is None
    assert full["tokens_per_s_per_gpu"]["ar"][0][0] == pytest.approx(1e3 / 3.19289, rel=1e-4)
    assert full["best"][0] == ["colocated", "1:1"]
    # The price of a longer pass in between: above 1 token a round, and far below a block.
    assert 1.0 < full["lookups_equal_ar"][0]["tokens"] < 2.0
    assert body["lookup_tokens"] == 1.6
    assert {own["basis"] for own in body["inputs"]} >= {"measured", "datasheet", "assumed"}
    assert "a cycle is one denoiser pass" in body["tokens_per_pass_mean"]["verified"]


def test_a_picture_where_nothing_fits(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "map.png"
    shown = run("--gpu", "h100", "--context", "131072", "--map", str(picture), *SMALL)
    assert shown.exit_code == 0, shown.output
    assert "nothing fits" in shown.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--map", "map.pdf"], "map: got 'map.pdf', expected a file of .svg or .png"),
        (["--map", "no/such/map.svg"], "expected a file in a folder that exists"),
        (["--map", "map.svg", "--batch", "4"], "batch: got 4 with --map, expected --batches"),
        (["--map", "map.svg", "--gamma", "0.8"], "expected --tokens-per-pass"),
        (["--map", "map.svg", "--cycle-tokens", "3"], "expected --tokens-per-pass"),
        (["--lookup-tokens", "0.5"], "lookup_tokens: got 0.5, expected 1 to 16"),
        (["--batches", "1,2"], "batches: got '1,2' without --map"),
        (["--gpu", "h100", "--measured", str(REPORTS)], "expected a H100"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], named: str) -> None:
    refused = run(*arguments)
    assert refused.exit_code == 2
    assert named in refused.stderr


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused = run("--map", str(tmp_path / "map.svg"))
    assert refused.exit_code == 2
    assert "map: needs matplotlib; pip install 'twotower[bench]'" in refused.stderr
