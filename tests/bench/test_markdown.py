"""Tables of a report."""

from __future__ import annotations

from typing import Any

from twotower.bench.markdown import markdown
from twotower.bench.report import SECTIONS

HEAD: dict[str, Any] = {
    "date": "2026-01-01",
    "hardware": {"device": "NVIDIA X", "cpu": "some CPU", "torch": "2.11.0", "triton": "3.6.0"},
    "options": {"preset": "30b", "dtype": "bfloat16", "experts": "full", "unique": 34.0},
    "ceilings": {"bytes_per_s": 4.31e12, "matmul_flops": 7.9e14, "wide_flops": 5e13},
}
EMPTY: dict[str, Any] = {name: [] for name in (*SECTIONS, "steps")}


def decoded(rows: int, speed: float) -> dict[str, Any]:
    floor = {
        "unique_experts": 6.0,
        "gigabytes": 6.58,
        "floor_ms": 1.53,
        "share_of_floor": 0.5,
        "terabytes_per_s": 2.15,
        "share_of_copy": 0.499,
    }
    return {
        "mode": "ar",
        "profile": None,
        "rows": rows,
        "context": 4096,
        "tokens_per_s": speed,
        "spread": 0.01,
        "nfe_a_block": 0.0,
        "passes": [{"kind": "ar", "rows_a_pass": float(rows), "ms": 3.06, **floor}],
    }


def test_a_report_without_results_says_what_is_missing() -> None:
    steps = [
        {"step": "setup", "status": "done", "seconds": 3.0},
        {"step": "scans", "status": "left out", "reason": "25 minutes were over"},
    ]
    text = markdown({**HEAD, **EMPTY, "steps": steps})
    assert "one NVIDIA X (host some CPU)" in text
    assert "narrowed to 34 experts for one row" in text
    assert "###" not in text
    assert text.endswith("Not measured:\n\n- scans: left out, 25 minutes were over\n")


def test_rows_that_a_batch_changes_are_shares() -> None:
    entry = {"mode": "ar", "rows": 64, "compared": 16, "tokens_differ": 0.125, "bits_differ": 1.0}
    text = markdown({**HEAD, **EMPTY, "invariance": [entry | {"prompt": 1024, "tokens": 32}]})
    assert "| ar | 64 | 16 | 0.125 | 1 |" in text
    assert "read 1024 tokens and write 32" in text
    assert "deterministic" not in text
    options = {**HEAD["options"], "deterministic": True}
    # A report of an earlier version has no such section.
    earlier = {name: value for name, value in EMPTY.items() if name != "invariance"}
    assert "experts full, deterministic, the" in markdown({**HEAD, **earlier, "options": options})


def test_a_row_that_was_measured_again_beside_others_stands_once() -> None:
    decode = [decoded(1, 327.4), decoded(16, 1234.5), decoded(1, 300.0)]
    text = markdown({**HEAD, **EMPTY, "decode": decode})
    lines = [line for line in text.splitlines() if line.startswith("| ar |")]
    assert lines == [
        "| ar | - | 1 | 4096 | 327 | 0.01 | 0 | 1 |",
        "| ar | - | 16 | 4096 | 1234 | 0.01 | 0 | 16 |",
        "| ar | ar | 1 | 4096 | 3.06 | 6 | 6.58 | 1.53 | 0.5 | 2.15 | 0.499 |",
        "| ar | ar | 16 | 4096 | 3.06 | 6 | 6.58 | 1.53 | 0.5 | 2.15 | 0.499 |",
    ]
