"""`twotower sweep` from its options to its files, and its errors in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from twotower.cli.main import app

COSTS = {"source": "a test", "rows": 2, "ar_ms": 1.0, "block_ms": {}}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "import os\n", "reference": "import sys"},
        {"prompt": "def ", "reference": "f"},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_small_sweep(prompts: Path, tmp_path: Path) -> None:
    costs, out = tmp_path / "costs.json", tmp_path / "out"
    costs.write_text(json.dumps(COSTS))
    command = ["sweep", str(prompts), "--out", str(out), "--pass-costs", str(costs), "--limit", "1"]
    grid = ["--modes", "ar,verified", "--block-sizes", "8", "--draft-steps", "1"]
    rest = ["--max-tokens", "8", "--score", "next_line,exact", "--seed", "3"]
    done = CliRunner().invoke(app, [*command, *grid, *rest])
    assert done.exit_code == 0, done.output
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[2:]] == [
        "ar",
        "verified, block 8, drafts 1",
    ]
    assert table[0].endswith("| next line | exact |")
    assert str(out) in done.stderr
    files = {path.name for path in out.iterdir()}
    assert {"points.jsonl", "sweep.csv", "sweep.json", "sweep.svg"} <= files
    settings = json.loads((out / "sweep.json").read_text())["settings"]
    assert (settings["seed"], settings["max_tokens"]) == (3, 8)
    assert settings["prompts"].startswith("1 ")
    other = CliRunner().invoke(app, [*command, *grid, *rest, "--seed", "4"])
    assert other.exit_code == 2
    assert "seed 3 there, 4 now" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--thresholds", "0.5,1.5"], "confidence_threshold: got 1.5, expected"),
        (["--thresholds", "0.5,high"], "thresholds: got '0.5,high', expected numbers with commas"),
        (["--steps", "2.5"], "steps: got '2.5', expected whole numbers with commas"),
        (["--block-sizes", ""], "block_size: got [], expected at least 1 value"),
        (["--draft-steps", "0"], "draft_steps: got 0"),
        (["--modes", "ar,beam"], "modes: got 'beam'"),
        (["--strategy", "luck"], "strategy: got 'luck', expected one of lookup"),
        (["--max-tokens", "0"], "max_tokens: got 0"),
        (["--limit", "0"], "limit: got 0"),
        (["--batch", "0"], "batch: got 0"),
        (["--threads", "0"], "threads: got 0"),
        (["--repeats", "0"], "repeats: got 0"),
        (["--dtype", "float16"], "dtype: got 'float16'"),
        (["--score", "bleu"], "score: got 'bleu', expected one of none, next_line"),
        (["--model", "no-such-folder"], "no-such-folder"),
    ],
)
def test_errors_are_one_line(
    prompts: Path, tmp_path: Path, arguments: list[str], named: str
) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["sweep", str(prompts), "--out", str(out), *arguments])
    assert result.exit_code == 2, result.output
    assert named in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not out.exists()


def test_a_file_without_prompts(tmp_path: Path) -> None:
    empty = tmp_path / "prompts.txt"
    empty.write_text("\n\n")
    result = CliRunner().invoke(app, ["sweep", str(empty), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "prompts: got 'prompts.txt', expected a file of at least 1 prompt" in result.stderr
