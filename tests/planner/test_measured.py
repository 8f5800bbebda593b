"""Several reports as one, and estimates at measured passes, against the reports' figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from twotower.planner.devices import DEVICES
from twotower.planner.estimates import Estimator
from twotower.planner.floors import Ceilings
from twotower.planner.measured import MeasuredPasses, by_format, read_all
from twotower.planner.passes import Passes, Reached
from twotower.planner.plan import make_plan
from twotower.planner.question import Question
from twotower.planner.schedules import BLOCK
from twotower.planner.shapes import LARGE
from twotower.towers.errors import ConfigError

REPORTS = Path(__file__).parents[2] / "benchmarks" / "results" / "h200-2026-11-27"
H200 = MeasuredPasses(
    "a.json: NVIDIA H200, today",
    4096,
    {"ar": [(16.0, 0.010)]},
    Ceilings(4e12, 700e12, 50e12),
    fp8=False,
    device="NVIDIA H200",
)


def test_reports_of_one_gpu_are_merged_by_format() -> None:
    second = replace(H200, source="b.json: NVIDIA H200, today", ceilings=Ceilings(5e12, 8e14, 6e13))
    second = replace(second, seconds={"ar": [(1.0, 0.004), (16.0, 0.014)]})
    narrow = replace(H200, source="c.json: NVIDIA H200, today", fp8=True, cycles=[(16.0, 1.5)])
    known = by_format([H200, second, narrow])
    assert known["full"].seconds == {"ar": [(1.0, 0.004), (16.0, pytest.approx(0.012))]}
    assert known["full"].ceilings == Ceilings(4.5e12, 750e12, 55e12)
    assert known["full"].source == "a.json, b.json: NVIDIA H200, today"
    assert known["fp8"].seconds == narrow.seconds
    # What happens between the passes of a cycle is measured in one format for both.
    assert known["full"].cycles == [(16.0, 1.5)]


def test_a_rate_that_only_some_reports_have_is_the_mean_of_these() -> None:
    second = replace(H200, source="b.json: NVIDIA H200, today", ceilings=Ceilings(5e12, 8e14, 6e13))
    narrow = replace(second, ceilings=Ceilings(6e12, 9e14, 7e13, 1.2e15))
    assert by_format([H200, second, narrow])["full"].ceilings == Ceilings(5e12, 8e14, 6e13, 1.2e15)


def test_passes_with_products_in_8_bits_are_not_planned_with(tmp_path: Path) -> None:
    body = json.loads((REPORTS / "speed-1-fp8.json").read_text())
    body["options"]["expert_products"] = "fp8"
    (tmp_path / "speed.json").write_text(json.dumps(body))
    with pytest.raises(ConfigError, match="measured: got expert_products 'fp8', expected 'widene"):
        read_all([tmp_path], LARGE, Question("h200"))
    body["options"]["expert_products"] = "widened"
    (tmp_path / "speed.json").write_text(json.dumps(body))
    assert read_all([tmp_path], LARGE, Question("h200"))[0].fp8


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (replace(H200, device="NVIDIA H200 NVL"), "of NVIDIA H200 and NVIDIA H200 NVL"),
        (replace(H200, context=1024), "at 4096 and 1024 tokens"),
        (replace(H200, fp8=None, source="stats.json: stats"), "stats.json: stats beside"),
    ],
)
def test_what_cannot_be_merged(other: MeasuredPasses, named: str) -> None:
    for order in ([H200, other], [replace(H200, fp8=True), other]):
        with pytest.raises(ConfigError) as caught:
            by_format(order)
        assert "measured: got" in str(caught.value)
    with pytest.raises(ConfigError):
        by_format([other, H200])
    assert named in str(_refusal([H200, other]))


def _refusal(reports: list[MeasuredPasses]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        by_format(reports)
    return caught.value


def test_stats_alone_are_of_both_formats() -> None:
    stats = replace(H200, fp8=None, device="")
    assert by_format([stats]) == {"full": stats, "fp8": stats}
    assert by_format([]) == {}


def test_a_report_of_another_gpu_than_the_planned_one() -> None:
    with pytest.raises(ConfigError, match="got 'NVIDIA H200', expected a H100"):
        read_all([REPORTS], LARGE, Question("h100"))


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected a folder with \.json files"):
        read_all([tmp_path], LARGE, Question("h200"))


def milliseconds(name: str, kind: str) -> float:
    """A pass in a committed report."""
    body = json.loads((REPORTS / name).read_text())
    (found,) = (
        own["ms"] for entry in body["decode"] for own in entry["passes"] if own["kind"] == kind
    )
    return float(found)


def estimator(experts: str) -> Estimator:
    known = by_format(read_all([REPORTS], LARGE, Question("h200")))
    own = "fp8" if experts == "fp8" else "full"
    return Estimator(Question("h200"), LARGE, own, known[own], Reached())


@pytest.mark.parametrize(
    ("experts", "name", "rows"),
    [
        ("full", "speed-1.json", 1),
        ("full", "speed-64.json", 64),
        ("full", "speed-128.json", 128),
        ("fp8", "speed-1-fp8.json", 1),
        ("fp8", "speed-16-fp8.json", 16),
        ("fp8", "speed-64-fp8.json", 64),
    ],
)
def test_estimates_have_the_measured_passes(experts: str, name: str, rows: int) -> None:
    ar, denoise, extend = (milliseconds(name, kind) / 1e3 for kind in ("ar", "denoise", "extend"))
    own = estimator(experts).at(rows, 4.0)
    assert own.ar().tokens_per_s == pytest.approx(rows / ar)
    in_step = rows * BLOCK / (4 * denoise + extend)
    assert own.colocated().in_step == pytest.approx(in_step)
    assert own.passes.basis("denoise", rows) == "measured"


def test_a_verified_cycle_is_the_measured_one() -> None:
    """Two reports have a denoiser pass of 16 rows; the cycle's ratio is to its own run's passes."""
    body = json.loads((REPORTS / "verified-16.json").read_text())["decode"][0]
    verify, denoise = (
        milliseconds("verified-16.json", "verify"),
        milliseconds("verified-16.json", "denoise"),
    )
    mean = (denoise + milliseconds("speed-16.json", "denoise")) / 2
    expected = (mean + verify) * body["cycle_ms"] / (denoise + verify)
    one, pair = estimator("full").at(16, 5.0).verified(5.0)
    assert one.tokens_per_s == pytest.approx(16 * 5 / (expected / 1e3))
    assert pair.per_gpu < one.per_gpu / 2
    assert (one.gpus, pair.gpus) == (1, 2)


def test_between_measured_rows_the_ratio_is_interpolated() -> None:
    """Half way over the logarithm between 16 and 64 rows are 32, beyond 128 the ratio stays."""
    passes = estimator("full").passes
    ratio = {
        rows: passes.ar(rows) / passes.modelled("ar", rows, 4096) for rows in (16, 32, 64, 128, 256)
    }
    assert ratio[32] == pytest.approx((ratio[16] + ratio[64]) / 2)
    assert ratio[256] == pytest.approx(ratio[128])
    assert [passes.basis("ar", rows) for rows in (16, 32, 256)] == ["measured", "between", "beyond"]
    extended = {
        rows: passes.extend(rows) / passes.modelled("extend", rows, 4096) for rows in (1, 64)
    }
    for rows, own in extended.items():
        assert passes.verify(rows) / passes.modelled("verify", rows, 4096) == pytest.approx(own)
        assert passes.basis("verify", rows) == "extension"
    assert passes.basis("verify", 16) == "measured"


def test_continuous_decoding_is_simulated_as_it_was_measured() -> None:
    """Runs that no estimate reads: rows that wait for nobody, headline profile, one GPU."""
    for rows in (16, 64, 128):
        body = json.loads((REPORTS / "continuous" / f"{rows}.json").read_text())
        (measured,) = (own for own in body["decode"] if own["mode"] == "mask_diffusion")
        own = estimator("full").at(rows, BLOCK / measured["nfe_a_block"]).colocated()
        assert own.tokens_per_s == pytest.approx(measured["tokens_per_s"], rel=0.1)


def test_eight_bits_are_no_faster_on_hopper_unless_measured_so() -> None:
    """Where bytes bound them, experts take as long as in bf16; other passes are as before."""
    ceilings = DEVICES["h200"].ceilings()
    full = Passes(LARGE, ceilings, 4096, fp8=False)
    hopper = Passes(LARGE, ceilings, 4096, fp8=True, reached=Reached(fp8=0.5))
    bytes_alone = Passes(LARGE, ceilings, 4096, fp8=True)
    for rows in (1, 16, 64):
        assert hopper.ar(rows) == pytest.approx(full.ar(rows), rel=0.03)
        assert hopper.denoise(rows) == pytest.approx(full.denoise(rows), rel=0.1)
        assert bytes_alone.ar(rows) < 0.9 * full.ar(rows)
    # The measurement that the factor is taken from.
    for rows in (1, 16, 64):
        for kind in ("ar", "denoise", "extend"):
            narrow = milliseconds(f"speed-{rows}-fp8.json", kind)
            assert 0.91 < narrow / milliseconds(f"speed-{rows}.json", kind) < 1.16


@pytest.mark.parametrize(
    ("gpu", "basis", "said"),
    [
        ("h200", "measured", "took 0.92 to 1.15"),
        ("h100", "assumed", "as on an H200"),
        ("b200", "assumed", "a measurement contradicts it"),
    ],
)
def test_a_plan_says_what_it_takes_of_eight_bits(gpu: str, basis: str, said: str) -> None:
    plan = make_plan(Question(gpu, batch=1, most_denoisers=1))
    (given,) = (own for own in plan.inputs if own.name == "8-bit experts")
    assert given.basis == basis
    assert said in given.source
    speed = {own.experts: own.tokens_per_s for own in plan.estimates if own.name == "AR"}
    ratio = speed["fp8"] / speed["full"]
    assert (ratio > 1.1) == (gpu == "b200")


def test_measured_formats_are_compared_in_the_inputs() -> None:
    question = Question("h200", batch=1, most_denoisers=1)
    plan = make_plan(question, LARGE, read_all([REPORTS], LARGE, question))
    shown = {own.name: own for own in plan.inputs}
    assert shown["8-bit experts"].value == "0.92 to 1.15 of a pass in bf16"
    assert shown["verified cycles"].value == "1.47 of their two passes"
    assert {own.experts for own in plan.estimates} == {"full", "fp8"}
