"""Runs lm-eval's tasks on a model: its results with our counters, as files and as a table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twotower.evaluation import check_installed
from twotower.towers.errors import InvalidRequestError, UnavailableError

if TYPE_CHECKING:
    from twotower.evaluation.lm_eval_model import TwoTowerLM

# Ours among the keys of lm-eval's results.
OWN_KEY = "twotower"


@dataclass(frozen=True)
class Question:
    """What to run: names of lm-eval's tasks, or of task files below `include_path`.

    `limit` is the number of documents of each task, below 1 their share; `num_fewshot` None leaves
    each task's own. With `log_samples` results have every document and answer. Tasks whose scoring
    runs what the model has written need `run_code`.
    """

    tasks: Sequence[str]
    include_path: Path | None = None
    limit: float | None = None
    num_fewshot: int | None = None
    log_samples: bool = False
    run_code: bool = False

    def __post_init__(self) -> None:
        if not self.tasks or not all(self.tasks):
            raise InvalidRequestError("tasks", ",".join(self.tasks), "names of tasks")
        if self.limit is not None and not 0 < self.limit < math.inf:
            raise InvalidRequestError("limit", self.limit, "a finite number above 0")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise InvalidRequestError("num_fewshot", self.num_fewshot, "at least 0")


def evaluate(model: TwoTowerLM, question: Question) -> dict[str, Any]:
    """lm-eval's results, as `simple_evaluate` gives them, with what they cost under `twotower`.

    Raises InvalidRequestError for an unknown task, UnavailableError for one whose data can neither
    be read nor fetched, and what the model raises.
    """
    check_installed()
    from lm_eval import simple_evaluate

    from twotower.evaluation.backend import Spent

    model.spent = Spent()
    limit = question.limit
    try:
        results: dict[str, Any] | None = simple_evaluate(
            model=model,
            tasks=list(question.tasks),
            task_manager=_task_manager(question),
            num_fewshot=question.num_fewshot,
            limit=int(limit) if limit is not None and limit >= 1 else limit,
            batch_size=model.batch_size,
            log_samples=question.log_samples,
            confirm_run_unsafe_code=question.run_code,
        )
    except (ConnectionError, FileNotFoundError) as error:
        # Of the library that loads data sets; what a service fails with is a TwoTowerError.
        names = ", ".join(question.tasks)
        raise UnavailableError(f"tasks: the data of {names} is not to be had: {error}") from error
    assert results is not None, "there is one process"
    results[OWN_KEY] = model.get_model_info() | {"spent": model.spent.report()}
    return results


def _task_manager(question: Question) -> Any:
    """lm-eval's index of the tasks. That of its own 14,000 files takes seconds, and is made only if
    a task is not found below `include_path`. Raises InvalidRequestError for an unknown task."""
    from lm_eval.tasks import TaskManager

    folder = question.include_path
    if folder is not None:
        if not folder.is_dir():
            raise InvalidRequestError("include_path", str(folder), "a folder of task files")
        own = TaskManager(include_path=str(folder), include_defaults=False)
        if set(question.tasks) <= set(own.all_tasks):
            return own
    tasks = TaskManager(include_path=None if folder is None else str(folder))
    for name in question.tasks:
        if name not in tasks.all_tasks:
            place = "" if folder is None else f", or one below {folder}"
            raise InvalidRequestError("tasks", name, f"a task, group or tag of lm-eval{place}")
    return tasks


def write_results(results: Mapping[str, Any], path: Path) -> list[Path]:
    """Writes results as lm-eval's command does: one JSON file, and the samples of each task, if
    there are any, as JSONL beside it. Returns the files."""
    from lm_eval.utils import handle_non_serializable

    def dumped(value: object, indent: int | None = None) -> str:
        return json.dumps(value, indent=indent, default=handle_non_serializable, ensure_ascii=False)

    written = [path]
    path.parent.mkdir(parents=True, exist_ok=True)
    rest = {name: value for name, value in results.items() if name != "samples"}
    path.write_text(dumped(rest, 2) + "\n", encoding="utf-8")
    for task, samples in results.get("samples", {}).items():
        beside = path.with_name(f"{path.stem}.samples_{task}.jsonl")
        beside.write_text("".join(dumped(one) + "\n" for one in samples), encoding="utf-8")
        written.append(beside)
    return written


def shown(results: Mapping[str, Any]) -> str:
    """lm-eval's tables of the results, and a line of what they cost."""
    from lm_eval.utils import make_table

    parts = [make_table(results)]
    if results.get("groups"):
        parts.append(make_table(results, "groups"))
    return "\n".join([*parts, *cost_lines(results[OWN_KEY]["spent"])])


def cost_lines(spent: Mapping[str, Any]) -> list[str]:
    """What was written and what was scored, a line each."""
    lines = []
    if spent["completions"]:
        each = f" ({spent['tokens_per_nfe']:.2f} tokens each)" if spent["nfe"] else ""
        lines.append(
            f"{spent['completions']} completions: {spent['tokens']} tokens, "
            f"{spent['nfe']} denoiser passes{each}, {spent['context_passes']} context passes, "
            f"{spent['tokens_per_pass']:.2f} tokens per pass"
        )
    if spent["scored_texts"]:
        passes = f", {spent['scored_nfe']} denoiser passes" if spent["scored_nfe"] else ""
        lines.append(
            f"{spent['scored_texts']} texts scored: {spent['scored_tokens']} tokens{passes}"
        )
    if spent["cut_prompts"]:
        lines.append(f"{spent['cut_prompts']} contexts were longer than the model's and were cut")
    return lines
