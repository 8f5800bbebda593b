"""The order of measurements, the time they may take, and what becomes of failures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from twotower.bench import suite
from twotower.bench.options import SECTIONS, BenchOptions, defaults_for
from twotower.bench.random_towers import TowerMaker
from twotower.bench.report import Report
from twotower.bench.suite import Step, run_suite, steps
from twotower.bench.workbench import Workbench

QUICK = BenchOptions(batches=(1,), sections=("scans",), scans=64, scan_rows=8)


class Clock:
    """Stands in for `time`, and moves only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def run_steps(
    monkeypatch: pytest.MonkeyPatch, chosen: list[Step], out: Path | None = None
) -> Report:
    monkeypatch.setattr(suite, "steps", lambda _: chosen)
    return run_suite(QUICK, out, lambda _: None)


def test_the_most_important_comes_first() -> None:
    options = defaults_for("30b", "cuda")
    found = [step.section for step in steps(options)]
    assert list(dict.fromkeys(found)) == list(SECTIONS)
    names = [step.name for step in steps(options)]
    assert names[:3] == [f"ar and headline in step, {rows} rows" for rows in (1, 16, 64)]
    assert len(set(names)) == len(names)


def test_each_step_is_told_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    chosen = [
        Step("scans", name, lambda *_, name=name: told.append(f"ran {name}")) for name in ("a", "b")
    ]
    monkeypatch.setattr(suite, "steps", lambda _: chosen)
    run_suite(QUICK, None, lambda _: None, lambda *one: told.append(one))
    assert told == [(0, 2, "a"), "ran a", (1, 2, "b"), "ran b"]


def test_only_the_sections_asked_for_are_measured() -> None:
    options = BenchOptions(sections=("scans", "baseline"))
    assert [step.section for step in steps(options)] == ["scans", "baseline", "baseline"]
    # Quantized experts have no plain product.
    assert [step.section for step in steps(replace(options, experts="fp8"))] == ["scans"]


def test_what_has_no_time_left_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(suite.time, "monotonic", clock.monotonic)

    def slow(_: Workbench, report: Report) -> None:
        report.add("scans", {"scans": 1})
        clock.now += 60.0 * QUICK.minutes

    report = run_steps(monkeypatch, [Step("scans", name, slow) for name in ("first", "second")])
    assert report.sections["scans"] == [{"scans": 1}]
    assert [(step["step"], step["status"]) for step in report.steps] == [
        ("setup", "done"),
        ("first", "done"),
        ("second", "left out"),
    ]


def test_a_failure_costs_nothing_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "new" / "bench.json"
    seen: list[dict[str, Any]] = []

    def fails(_: Workbench, __: Report) -> None:
        raise MemoryError("no room for 64 rows")

    def works(_: Workbench, report: Report) -> None:
        seen.append(json.loads(out.read_text()))
        report.add("scans", {"scans": 7})

    chosen = [Step("scans", "fails", fails), Step("scans", "works", works)]
    report = run_steps(monkeypatch, chosen, out)
    assert report.any_failed()
    # What was known before the second step was on disk already.
    assert seen[0]["steps"][-1]["reason"] == "MemoryError: no room for 64 rows"
    written = json.loads(out.read_text())
    assert written["scans"] == [{"scans": 7}]
    assert written == json.loads(json.dumps(report.to_dict()))
    assert [path.name for path in out.parent.iterdir()] == ["bench.json"]


def test_towers_that_do_not_fit_cost_no_ceilings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As on a card that is smaller than both towers."""

    def too_large(_: TowerMaker) -> None:
        raise MemoryError("tried to allocate 63 GB")

    monkeypatch.setattr(TowerMaker, "denoiser", too_large)
    report = run_suite(QUICK, tmp_path / "bench.json", lambda _: None)
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written == json.loads(json.dumps(report.to_dict()))
    assert written["ceilings"]["bytes_per_s"] > 0
    (step,) = written["steps"]
    assert (step["step"], step["status"]) == ("setup", "failed")
    assert step["reason"] == "MemoryError: tried to allocate 63 GB"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "7b"}, "preset: got '7b', expected one of 30b, tiny"),
        ({"experts": "int4"}, "experts: got 'int4', expected one of full, fp8"),
        ({"expert_products": "int8"}, "expert_products: got 'int8', expected one of widened, fp8"),
        ({"expert_products": "fp8"}, "expert_products: got 'fp8', expected 'widened' for experts"),
        ({"batches": (4, 0)}, "batches: got 0, expected 1 to"),
        ({"batches": ()}, "batches: got 0, expected 1 to"),
        ({"context": 1}, "context: got 1, expected 2 to"),
        ({"profiles": ("poems",)}, "profiles: got 'poems', expected one of"),
        ({"sections": ("speeds",)}, "sections: got 'speeds', expected one of"),
        ({"unique": 16.0}, "unique: got 16.0, expected 0 or 1 to 15"),
        ({"minutes": 0.0}, "minutes: got 0.0, expected above 0"),
    ],
)
def test_options_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BenchOptions(**changes)
