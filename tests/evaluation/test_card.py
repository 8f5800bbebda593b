"""The card's tasks: the published table, and lm-eval's names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from twotower.evaluation.card import CardTask, figure, parse_card, read_card, table
from twotower.towers.errors import InvalidRequestError

# lm-eval's folders that hold them; its whole index takes seconds.
FOLDERS = "mmlu mmlu_pro arc winogrande race humaneval mbpp gsm8k minerva_math global_mmlu mgsm"


def test_the_columns_add_up_to_the_published_sums() -> None:
    card = read_card()
    assert len(card.tasks) == len({task.name for task in card.tasks}) == 11
    assert sum(task.ar for task in card.tasks) == pytest.approx(883.5, abs=0.05)
    assert sum(task.diffusion for task in card.tasks) == pytest.approx(871.8, abs=0.05)
    assert [task.name for task in card.tasks if task.runs_code] == ["humaneval", "mbpp_sanitized"]
    assert card.operating_point["confidence_threshold"] == 0.8


@pytest.mark.filterwarnings("default")
def test_lm_eval_has_every_task(lm_eval: Any) -> None:
    root = Path(lm_eval.tasks.__file__).parent
    folders = [str(root / name) for name in FOLDERS.split()]
    known = lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False).all_tasks
    named = {name for task in read_card().tasks for name in task.tasks}
    assert named - set(known) == set()


def test_a_field_too_many_or_too_few_is_named() -> None:
    task = {"name": "x", "title": "X", "tasks": ["x"], "shots": 0, "card_metric": None}
    rest = {"metric": "acc", "filter": "none", "ar": 1.0, "diffusion": 2.0}
    whole = {"model": "m", "operating_point": {}, "tasks": [{**task, **rest}]}
    assert parse_card(whole).tasks[0].key == "acc,none"
    for entry, name in (({**task, **rest, "shot": 1}, "shot"), (task, "ar")):
        with pytest.raises(ValueError, match=f"x: {name}: unknown or missing"):
            parse_card({**whole, "tasks": [entry]})


def test_tasks_are_chosen_by_name() -> None:
    card = read_card()
    assert card.chosen(["all"]) == list(card.tasks)
    assert [task.title for task in card.chosen(["gsm8k", "mmlu"])] == ["GSM8K", "MMLU"]
    with pytest.raises(InvalidRequestError, match="tasks: got 'mlu'"):
        card.chosen(["mlu"])


def named(*tasks: str) -> CardTask:
    return CardTask("x", "X", tasks, 0, None, "acc", "none", 1.0, 2.0)


def test_figures_of_tasks_groups_and_tags() -> None:
    one = {"results": {"a": {"acc,none": 0.5, "acc_stderr,none": 0.1}}}
    assert figure(one, named("a")) == 50.0
    group = {
        "results": {"g": {"alias": "g"}, "a": {"acc,none": 0.5}, "b": {"acc,none": 0.7}},
        "group_subtasks": {"g": ["a", "b"]},
    }
    assert figure(group, named("g")) == pytest.approx(60.0)
    assert figure(group, named("a", "b")) == pytest.approx(60.0)
    tag = {"results": {"t_en": {"acc,none": 0.2}, "t_de": {"acc,none": 0.4}}, "group_subtasks": {}}
    assert figure(tag, named("t")) == pytest.approx(30.0)
    assert figure({"results": {"a": {"other,none": 1.0}}}, named("a")) is None


def test_the_table_shows_what_was_measured_beside_the_card() -> None:
    card = read_card()
    assert len(table(card).splitlines()) == 2 + 11
    shown = table(card, {"gsm8k": 12.345, "mmlu": None}).splitlines()
    assert shown[2] == "| MMLU | mmlu | 5 | acc | 78.56 | 78.24 | none |"
    assert shown[3] == "| GSM8K | gsm8k_cot | 8 | exact_match | 92.49 | 90.14 | 12.35 |"
    assert len(shown) == 4
