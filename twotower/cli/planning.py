"""Answers of `twotower plan`, as text or JSON.

Heavy imports happen inside, so that a command brings no more than it needs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twotower.cli.progress import hub_bars, working

if TYPE_CHECKING:
    from twotower.planner.measured import MeasuredPasses
    from twotower.planner.question import Question
    from twotower.towers.config.model_config import TwoTowerConfig

# Options of a load, which a map has as its axes.
_AXES = {
    "batch": "batches",
    "gamma": "tokens-per-pass",
    "text": "tokens-per-pass",
    "tokens_per_nfe": "tokens-per-pass",
    "cycle_tokens": "tokens-per-pass",
}


def planned(
    settings: Mapping[str, Any],
    load: Mapping[str, Any],
    axes: Mapping[str, str | None],
    model: str | None,
    measured: Sequence[Path],
    map_file: Path | None,
    as_json: bool,
) -> str:
    """What is printed of a plan, or of a map that is drawn into a file; values of `load` and `axes`
    may be None. Raises ConfigError."""
    from twotower.planner.measured import read_all
    from twotower.planner.question import Question, formats_named, model_config

    _check_axes(map_file, load, axes)
    experts = formats_named(settings["experts"])
    question = Question(**{**_given(settings), **_given(load), "experts": experts})
    with hub_bars():
        config = model_config(model)
    known = read_all(measured, config, question)
    if map_file is not None:
        return _mapped(map_file, question, config, known, axes, as_json=as_json)
    return _planned(question, config, known, as_json=as_json)


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _check_axes(
    map_file: Path | None, load: Mapping[str, Any], axes: Mapping[str, str | None]
) -> None:
    """Refuses options that would have no effect. Raises ConfigError."""
    from twotower.towers.errors import ConfigError

    for name, value in _given(axes if map_file is None else load).items():
        if map_file is None:
            raise ConfigError(f"{name}: got {value!r} without --map, whose axis it is")
        raise ConfigError(f"{name}: got {value!r} with --map, expected --{_AXES[name]}")


def _planned(
    question: Question, config: TwoTowerConfig, known: list[MeasuredPasses], *, as_json: bool
) -> str:
    from twotower.planner.plan import make_plan
    from twotower.planner.text import to_dict, to_text

    answer = make_plan(question, config, known)
    return json.dumps(to_dict(answer), indent=2) if as_json else to_text(answer)


def _mapped(
    path: Path,
    question: Question,
    config: TwoTowerConfig,
    known: list[MeasuredPasses],
    axes: Mapping[str, str | None],
    *,
    as_json: bool,
) -> str:
    """Draws the map; returns what is printed of it."""
    from twotower.planner.axes import BATCHES, TOKENS, batches_named, tokens_named
    from twotower.planner.map_picture import check_picture, draw
    from twotower.planner.map_text import to_dict, to_text
    from twotower.planner.placement_map import make_map

    check_picture(path)
    rows, tokens = axes["batches"], axes["tokens_per_pass"]
    batches = BATCHES if rows is None else batches_named(rows)
    heights = TOKENS if tokens is None else tokens_named(tokens)
    with working("planning", "pieces") as bar:
        answer = make_map(question, batches, heights, config, known, say=bar)
    draw(answer, path)
    shown = f"drawn: {path}\n\n{to_text(answer)}"
    return json.dumps(to_dict(answer), indent=2) if as_json else shown
