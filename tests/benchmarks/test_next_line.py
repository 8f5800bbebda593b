"""Rows of the next-line task from prompts written by hand, and its files in lm-eval."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from benchmarks.next_line import LIKELIHOOD_TASK, TASK, Row, rows_of, write_tasks
from benchmarks.prompts import Prompt


def test_rows_end_with_the_indentation_of_the_asked_line() -> None:
    prompts = [
        Prompt("a.py", "def f():\n    a = 1", "\n    return a  \n\nx = 1\n"),
        Prompt("blank.py", "def f():\n    a = 1", "\n\n    return a\n"),
        Prompt("outside.py", "def f():\n    a = 1", "\nx = 1\n"),
        Prompt("end.py", "def f():\n    a = 1", ""),
    ]
    assert list(rows_of(prompts)) == [Row("a.py", "def f():\n    a = 1\n    ", "return a")]


def test_the_task_files_name_their_data(tmp_path: Path) -> None:
    rows = [Row("a.py", 'x = "{{1}}"\n    ', "return")]
    write_tasks(tmp_path / "made", rows)
    for name in (TASK, LIKELIHOOD_TASK):
        task = yaml.safe_load((tmp_path / "made" / f"{name}.yaml").read_text(encoding="utf-8"))
        assert task["task"] == name
        data = Path(task["dataset_kwargs"]["data_files"]["test"])
        assert [Row(**json.loads(line)) for line in data.read_text().splitlines()] == rows
        assert (task["doc_to_text"], task["doc_to_target"]) == ("{{prompt}}", "{{line}}")
