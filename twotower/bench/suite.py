"""Runs the measurements, the most important first, as many as the time allows.

The report is written after each step, so that a program that is ended leaves all finished steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from twotower.bench.hardware import hardware
from twotower.bench.invariance import MODES, measure_invariance
from twotower.bench.options import BenchOptions
from twotower.bench.report import Report
from twotower.bench.scans import count_bad_scans
from twotower.bench.single_passes import measure_attention, measure_baseline, measure_breakdown
from twotower.bench.speed import Diffusion, measure_speed, measure_verified
from twotower.bench.workbench import Workbench, device_ceilings
from twotower.planner.floors import PassKind
from twotower.towers.request.modes import Mode

HEADLINE = Diffusion("headline", in_step=True)
HEADLINE_CONTINUOUS = Diffusion("headline", in_step=False)


@dataclass(frozen=True)
class Step:
    """A measurement of a section: `run` takes the workbench and adds entries to the report."""

    section: str
    name: str
    run: Callable[[Workbench, Report], None]


def run_suite(
    options: BenchOptions,
    out: Path | None,
    say: Callable[[str], None],
    progress: Callable[[int, int, str], None] | None = None,
) -> Report:
    """Runs all steps of `options`, each announced with `say`; writes the report to `out` after
    each. `progress` gets, before each, the number of those done, of all, and its name."""
    deadline = time.monotonic() + 60.0 * options.minutes
    report = Report(asdict(options), hardware(torch.device(options.device)))
    begun = time.monotonic()
    ceilings = device_ceilings(options)
    report.ceilings = asdict(ceilings)
    say(_device_line(report))
    try:
        bench = Workbench(options, ceilings)
    except Exception as error:
        # If the towers do not fit, the report still has the device's ceilings.
        report.failed("setup", error)
        say(report.last_step())
        if out is not None:
            report.write(out)
        return report
    report.ended("setup", time.monotonic() - begun)
    if options.experts != "full" and "baseline" in options.sections:
        report.left_out("plain PyTorch", f"{options.experts} experts have no plain product")
    try:
        wanted = steps(options)
        for index, step in enumerate(wanted):
            if progress is not None:
                progress(index, len(wanted), step.name)
            if time.monotonic() >= deadline:
                report.left_out(step.name, f"{options.minutes:g} minutes were over")
            else:
                _run_step(step, bench, report, say)
            if out is not None:
                report.write(out)
    finally:
        bench.close()
    return report


def steps(options: BenchOptions) -> list[Step]:
    """All steps of the sections asked for, in the order of the sections."""
    found = list(_all_steps(options))
    return [step for section in options.sections for step in found if step.section == section]


def _all_steps(options: BenchOptions) -> Iterator[Step]:
    few = [rows for rows in options.batches if rows in (1, 16, 64)] or list(options.batches)
    for rows in options.batches:
        yield _speed_step("speed", rows, (HEADLINE,))
        yield _speed_step("continuous", rows, (HEADLINE_CONTINUOUS,))
    for profile in options.profiles:
        for rows in few:
            yield _speed_step("profiles", rows, (Diffusion(profile, in_step=False),))
    kinds: tuple[PassKind, ...] = ("denoise", "ar")
    for rows in few:
        for kind in kinds:
            if options.experts == "full":
                yield _baseline_step(kind, rows)
            yield _breakdown_step(kind, rows)
        yield _verified_step(rows)
    yield Step("attention", "attention over long contexts", _attention)
    yield Step("scans", "seeded block scans", _scans)
    for mode in MODES:
        yield _invariance_step(mode)


def _run_step(step: Step, bench: Workbench, report: Report, say: Callable[[str], None]) -> None:
    begun = time.monotonic()
    try:
        step.run(bench, report)
    except Exception as error:
        # A measurement that fails, for lack of memory say, must not end the others.
        report.failed(step.name, error)
    else:
        report.ended(step.name, time.monotonic() - begun)
    if bench.device.type == "cuda":
        # The towers leave little memory, which the next step may need in pieces of other sizes.
        torch.cuda.empty_cache()
    say(report.last_step())


def _speed_step(section: str, rows: int, wanted: tuple[Diffusion, ...]) -> Step:
    def run(bench: Workbench, report: Report) -> None:
        decoded, ratios = measure_speed(bench, rows, wanted)
        report.add("decode", *decoded)
        report.add("ratios", *ratios)

    names = " and ".join(f"{diffusion.profile} {diffusion.sync}" for diffusion in wanted)
    return Step(section, f"ar and {names}, {rows} rows", run)


def _verified_step(rows: int) -> Step:
    def run(bench: Workbench, report: Report) -> None:
        report.add("decode", measure_verified(bench, rows))

    return Step("verified", f"verified, {rows} rows", run)


def _baseline_step(kind: PassKind, rows: int) -> Step:
    def run(bench: Workbench, report: Report) -> None:
        ours = report.pass_seconds(kind, rows)
        if ours is None:
            _speed_step("speed", rows, (HEADLINE,)).run(bench, report)
            ours = report.pass_seconds(kind, rows)
        assert ours is not None, "in step, every pass has all rows"
        report.add("baseline", measure_baseline(bench, kind, rows, ours))

    return Step("baseline", f"plain PyTorch, {kind}, {rows} rows", run)


def _breakdown_step(kind: PassKind, rows: int) -> Step:
    def run(bench: Workbench, report: Report) -> None:
        report.add("operators", measure_breakdown(bench, kind, rows))

    return Step("operators", f"operators, {kind}, {rows} rows", run)


def _invariance_step(mode: Mode) -> Step:
    def run(bench: Workbench, report: Report) -> None:
        report.add("invariance", *measure_invariance(bench, mode))

    return Step("invariance", f"rows in batches and alone, {mode}", run)


def _attention(bench: Workbench, report: Report) -> None:
    report.add("attention", measure_attention(bench, bench.options.long_rows))


def _scans(bench: Workbench, report: Report) -> None:
    options = bench.options
    done = count_bad_scans(
        bench.config,
        bench.device,
        bench.dtype,
        scans=options.scans,
        rows=options.scan_rows,
        block=options.block,
        seed=options.seed,
    )
    report.add("scans", done)


def _device_line(report: Report) -> str:
    found: dict[str, Any] = report.hardware
    ceilings = report.ceilings
    return (
        f"{found['device']} ({found['cpu']}), torch {found['torch']}: "
        f"copy {ceilings['bytes_per_s'] / 1e12:.3f} TB/s, "
        f"products {ceilings['matmul_flops'] / 1e12:.3g} TFLOP/s"
    )
