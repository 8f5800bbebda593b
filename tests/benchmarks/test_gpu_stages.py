"""Stages of the GPU program: limits, what a failure leaves, resuming, and the plans themselves."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_stages
from benchmarks.gpu.plan import PLANS, Stage, stages
from benchmarks.gpu.profile_passes import Launch, by_kernel, summary
from benchmarks.gpu.tables import table_of

ROOT = Path(__file__).parents[2]


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


WRITES = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('{\"found\": 7}')"


def test_a_stage_keeps_what_each_process_found_and_said(tmp_path: Path) -> None:
    stage = Stage("two", 20, ((*python(WRITES), "{out}"), python("print('hello'); exit(3)")), 2)
    entry = gpu_stages.run_stage(stage, tmp_path, 20)
    first, second = entry["runs"]
    assert (entry["status"], first["exit"], second["exit"]) == ("failed", 0, 3)
    assert first["figures"] == {"found": 7}
    assert second["figures"] is None
    assert second["tail"] == ["hello"]
    table = table_of(entry)
    assert "## two: failed" in table
    assert "hello" in table
    assert "| found |" in table


def test_a_process_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    """The figures and output of a process stay when it is ended."""
    mark = tmp_path / "mark"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(mark)!r}).touch()"
    hangs = (
        f"{WRITES}; import subprocess; print('begun', flush=True); "
        f"subprocess.run([sys.executable, '-c', {child!r}])"
    )
    begun = time.monotonic()
    stage = Stage("hangs", 1.5, ((*python(hangs), "{out}"),))
    (run,) = gpu_stages.run_stage(stage, tmp_path, 1.5)["runs"]
    assert time.monotonic() - begun < 3
    assert (run["exit"], run["figures"], run["tail"]) == (None, {"found": 7}, ["begun"])
    time.sleep(2.5)
    assert not mark.exists()


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu_stages", *arguments])
    return gpu_stages.main()


def test_resuming_runs_only_what_is_not_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = tmp_path / "count"
    again = f"open({str(count)!r}, 'a').write('x')"
    plan = [
        Stage("good", 20, (python(again),)),
        Stage("bad", 20, (python(f"{again}; exit(1)"),)),
        Stage("long", 1000, (python(again),)),
    ]
    monkeypatch.setattr(gpu_stages, "stages", lambda *_, **__: plan)
    out = tmp_path / "out"
    assert run_main(monkeypatch, str(out), "--budget", "60") == 1
    found = json.loads((out / "stages.json").read_text())
    assert [own["status"] for own in found] == ["done", "failed", "left out"]
    assert count.read_text() == "xx"
    assert run_main(monkeypatch, str(out), "--budget", "60", "--resume") == 1
    assert count.read_text() == "xxx"
    assert run_main(monkeypatch, str(out), "--budget", "900", "--resume", "--only", "long") == 0
    found = json.loads((out / "stages.json").read_text())
    assert [own["stage"] for own in found] == ["good", "long"]
    assert "## good: done" in (out / "stages.md").read_text()


@pytest.mark.parametrize("plan", list(PLANS))
@pytest.mark.parametrize("dry", [False, True])
def test_plans_name_what_there_is(plan: str, dry: bool) -> None:
    chosen = stages(plan, dry=dry)
    names = [stage.name for stage in chosen]
    assert len(set(names)) == len(names)
    for stage in chosen:
        assert stage.seconds <= 200
        for command in stage.commands:
            assert command[:2] == (sys.executable, "-m")
            assert importlib.util.find_spec(command[2]) is not None, command[2]
            for word in command[3:]:
                if word.startswith("tests/"):
                    assert (ROOT / word).is_file(), word


@pytest.mark.parametrize("plan", ["h200", "h100"])
def test_products_in_8_bits_are_measured_at_all_numbers_of_rows(plan: str) -> None:
    own = {stage.name: stage for stage in stages(plan)}
    for rows in (1, 16, 64, 128):
        (command,) = own[f"speed-{rows}-fp8-products"].commands
        words = " ".join(command)
        assert f"--batches {rows}" in words
        assert "--experts fp8 --expert-products fp8" in words


def test_an_unknown_plan_is_refused() -> None:
    with pytest.raises(ValueError, match="plan: got 'tpu', expected one of h200, h100, two"):
        stages("tpu")


def test_gaps_between_kernels_are_told_from_pauses_of_the_host() -> None:
    launches = [
        Launch("void gemm<float>(int)", 0.0, 10.0),
        Launch("norm", 12.0, 15.0),
        # Side by side with the one before.
        Launch("norm", 13.0, 16.0),
        Launch("void gemm<half>(int)", 116.0, 120.0),
    ]
    found = summary(launches)
    assert found["launches"] == 4
    assert found["total_ms"] == pytest.approx(0.12)
    assert found["busy_share"] == pytest.approx(18 / 120)
    assert found["launch_gap_share"] == pytest.approx(2 / 120)
    assert (found["pause_share"], found["pauses"]) == (pytest.approx(100 / 120), 1)
    kernels = [(own["kernel"], own["launches"], own["ms"]) for own in by_kernel(launches)]
    assert kernels == [("gemm", 2, 0.014), ("norm", 2, 0.006)]
    assert summary([]) == {"launches": 0}
