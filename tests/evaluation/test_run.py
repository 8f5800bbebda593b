"""`twotower eval` on small task files: its figures, files, table and errors."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.evaluation.conftest import ROWS, TASKS
from twotower import TwoTower
from twotower.cli.main import app

pytestmark = pytest.mark.filterwarnings("default")
NAMES = ",".join(TASKS)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["eval", *arguments])


def right_choices(model: TwoTower) -> float:
    """The share of rows whose gold choice is the likeliest, by the package's own scores."""
    right = 0
    for row in ROWS:
        context, choices = str(row["context"]), row["choices"]
        start = len(model.encode(context))
        scores = [
            math.fsum(model.score(model.encode(context + choice))[start - 1 :])
            for choice in choices  # type: ignore[attr-defined]
        ]
        right += scores.index(max(scores)) == row["gold"]
    return right / len(ROWS)


def bits_per_byte(model: TwoTower) -> float:
    """Of the contexts after an end of text, as lm-eval defines it."""
    texts = [str(row["context"]) for row in ROWS]
    nats = sum(sum(model.score([2, *model.encode(text)])) for text in texts)
    return -nats / sum(len(text.encode()) for text in texts) / math.log(2)


def test_tasks_in_process(
    lm_eval: Any, task_folder: Path, shipped: TwoTower, tmp_path: Path
) -> None:
    assert lm_eval is not None
    output = tmp_path / "out" / "results.json"
    done = run(
        *("--tasks", NAMES, "--include-path", str(task_folder), "--mode", "ar"),
        *("--output", str(output), "--log-samples", "--batch-size", "2"),
    )
    assert done.exit_code == 0, done.output
    found = json.loads(output.read_text(encoding="utf-8"))
    scores = found["results"]
    assert scores["tiny_choice"]["acc,none"] == pytest.approx(right_choices(shipped))
    assert scores["tiny_until"]["exact_match,none"] == pytest.approx(2 / 3)
    assert scores["tiny_rolling"]["bits_per_byte,none"] == pytest.approx(bits_per_byte(shipped))
    assert {"configs", "versions", "n-shot", "config", "lm_eval_version"} <= set(found)
    assert "samples" not in found
    spent = found["twotower"]["spent"]
    assert (spent["completions"], spent["nfe"], spent["scored_texts"]) == (3, 0, 3 + 3 + 2 + 3)
    samples = output.with_name("results.samples_tiny_until.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line)["exact_match"] for line in samples.splitlines()] == [1.0, 1.0, 0.0]
    assert "|tiny_until" in done.stdout.replace(" ", "")
    assert f"3 completions: {spent['tokens']} tokens, 0 denoiser passes" in done.stdout


def test_a_limit_and_the_denoisers_bound(lm_eval: Any, task_folder: Path, tmp_path: Path) -> None:
    assert lm_eval is not None
    output = tmp_path / "results.json"
    done = run(
        *("--tasks", "tiny_choice", "--include-path", str(task_folder), "--limit", "1"),
        *("--likelihood", "denoiser", "--samples", "3", "--output", str(output)),
    )
    assert done.exit_code == 0, done.output
    found = json.loads(output.read_text(encoding="utf-8"))
    assert found["twotower"]["likelihood"] == "denoiser"
    assert found["twotower"]["samples"] == 3
    assert found["twotower"]["spent"]["scored_texts"] == 3
    assert "denoiser passes" in done.stdout


@pytest.mark.parametrize("path", ["json", "nobody/no_such_data_set"])
def test_data_that_is_not_there_is_one_line(lm_eval: Any, task_folder: Path, path: str) -> None:
    """A file that is missing, and a data set of the hub without a network."""
    assert lm_eval is not None
    task = (task_folder / "tiny_until.yaml").read_text(encoding="utf-8")
    task = task.replace("tiny_until", "tiny_lost").replace("rows.jsonl", "lost.jsonl")
    task = task.replace("dataset_path: json", f"dataset_path: {path}")
    (task_folder / "tiny_lost.yaml").write_text(task, encoding="utf-8")
    done = run("--tasks", "tiny_lost", "--include-path", str(task_folder))
    assert done.exit_code == 2
    assert "error: tasks: the data of tiny_lost is not to be had: " in done.stderr


def test_the_card_is_listed_without_lm_eval() -> None:
    program = (
        "import sys\n"
        "sys.modules['lm_eval'] = None\n"
        "from typer.testing import CliRunner\n"
        "from twotower.cli.main import app\n"
        "done = CliRunner().invoke(app, ['eval', '--card'])\n"
        "assert done.exit_code == 0, done.output\n"
        "assert 'torch' not in sys.modules\n"
        "print(done.output)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert "| MMLU | mmlu | 5 | acc | 78.56 | 78.24 |" in done.stdout


def test_a_missing_package_is_named() -> None:
    program = (
        "import importlib.util, sys\n"
        "found = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: (\n"
        "    None if name == 'lm_eval' else found(name, *rest))\n"
        "from twotower.cli.main import main\n"
        "sys.argv = ['twotower', 'eval', '--tasks', 'x']\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "pip install 'twotower[eval]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "tasks: got None, expected names of tasks, or --card"),
        (["--tasks", ""], "tasks: got ''"),
        (["--tasks", "tiny_until", "--limit", "0"], "limit: got 0.0"),
        (["--tasks", "tiny_until", "--num-fewshot", "-1"], "num_fewshot: got -1"),
        (["--tasks", "tiny_until", "--param", "beams=2"], "param: got 'beams'"),
        (["--tasks", "tiny_until", "--param", "top_p"], "param: got 'top_p', expected NAME=NUMBER"),
        (["--tasks", "tiny_until", "--mode", "beam"], "mode: got 'beam'"),
        (["--tasks", "tiny_until", "--dtype", "float16"], "dtype: got 'float16'"),
        (["--tasks", "tiny_until", "--include-path", "/no/such"], "include_path: got '/no/such'"),
        (["--tasks", "tiny_until", "--target", "127.0.0.1:1"], "UNAVAILABLE"),
        (["--card", "--tasks", "mlu"], "tasks: got 'mlu', expected with --card one of all"),
        (["--card", "--tasks", "all"], "tasks: got 'humaneval', expected with --confirm-run"),
    ],
)
def test_wrong_arguments_are_one_line(lm_eval: Any, arguments: list[str], text: str) -> None:
    assert lm_eval is not None
    done = run(*arguments)
    assert done.exit_code == 2
    assert text in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error")]) == 1
