"""The tasks of the released model's card: how lm-eval runs them, and the published figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from twotower.towers.errors import InvalidRequestError

_FILE = "model_card_tasks.yaml"
ALL = "all"


@dataclass(frozen=True)
class CardTask:
    """A row of the card.

    `title`, `shots`, `card_metric` (None: none is published), `ar` and `diffusion` (per cent) are
    the card's. lm-eval's `tasks` come closest to it; their figure is the mean of `metric` after
    `filter` over them. `runs_code` says that scoring runs what the model has written. `differs` is
    what is known to be another thing than the card's.
    """

    name: str
    title: str
    tasks: tuple[str, ...]
    shots: int
    card_metric: str | None
    metric: str
    filter: str
    ar: float
    diffusion: float
    runs_code: bool = False
    differs: str | None = None

    @property
    def key(self) -> str:
        """The name of the figure in lm-eval's results."""
        return f"{self.metric},{self.filter}"


@dataclass(frozen=True)
class Card:
    """The card's model, tasks, and the parameters of its diffusion column."""

    model: str
    operating_point: Mapping[str, Any]
    tasks: tuple[CardTask, ...] = field(default=())

    def chosen(self, names: Sequence[str]) -> list[CardTask]:
        """The tasks of these names, or all for `all`. Raises InvalidRequestError for others."""
        by_name = {task.name: task for task in self.tasks}
        if list(names) == [ALL]:
            return list(self.tasks)
        for name in names:
            if name not in by_name:
                known = ", ".join([ALL, *by_name])
                raise InvalidRequestError("tasks", name, f"with --card one of {known}")
        return [by_name[name] for name in names]


@cache
def read_card() -> Card:
    """The card of the file in this package."""
    text = files("twotower.evaluation").joinpath(_FILE).read_text(encoding="utf-8")
    return parse_card(yaml.safe_load(text))


def parse_card(record: Mapping[str, Any]) -> Card:
    """A card from its record. Raises ValueError, naming the task, for a field that is unknown or
    missing."""
    tasks = tuple(_task(entry) for entry in record["tasks"])
    return Card(record["model"], record["operating_point"], tasks)


def _task(entry: Mapping[str, Any]) -> CardTask:
    known = {each.name for each in fields(CardTask)}
    needed = {each.name for each in fields(CardTask) if each.default is MISSING}
    wrong = sorted((set(entry) - known) | (needed - set(entry)))
    if wrong:
        raise ValueError(f"{_FILE}: {entry.get('name')}: {wrong[0]}: unknown or missing")
    return CardTask(**{**entry, "tasks": tuple(entry["tasks"])})


def figure(results: Mapping[str, Any], task: CardTask) -> float | None:
    """A task's figure in per cent from lm-eval's results; None if they have none.

    The mean over the names that were asked for; a name without a figure of its own (lm-eval's
    groups and tags may have none) stands for the mean of its members.
    """
    found = [_of_name(results, name, task.key) for name in task.tasks]
    known = [value for value in found if value is not None]
    return 100.0 * sum(known) / len(known) if known and len(known) == len(found) else None


def _of_name(results: Mapping[str, Any], name: str, key: str) -> float | None:
    own = results["results"].get(name, {}).get(key)
    if isinstance(own, int | float):
        return float(own)
    members = results.get("group_subtasks", {}).get(name, [])
    if name not in results["results"]:
        # A tag leaves no trace but its members, which then are all that there is.
        members = list(results["results"])
    values = [_of_name(results, member, key) for member in members]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def table(card: Card, measured: Mapping[str, float | None] | None = None) -> str:
    """The card as a Markdown table; or its rows of measured figures, with a column of these."""
    head = ["task", "lm-eval", "shots", "metric", "AR", "diffusion"]
    rows = [_cells(task) for task in card.tasks]
    if measured is not None:
        head.append("measured")
        rows = [
            [*_cells(task), _percent(measured[task.name])]
            for task in card.tasks
            if task.name in measured
        ]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _cells(task: CardTask) -> list[str]:
    first, more = task.tasks[0], len(task.tasks) - 1
    names = f"{first} and {more} more" if more else first
    figures = _percent(task.ar), _percent(task.diffusion)
    return [task.title, names, str(task.shots), task.metric, *figures]


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"
