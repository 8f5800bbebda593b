"""`twotower plan`: which placement of the towers fits a kind of GPU, and how fast it would be.

Heavy imports happen inside, so that a command brings no more than it needs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twotower.cli.progress import hub_bars, working

if TYPE_CHECKING:
    from twotower.planner.measured import MeasuredPasses
    from twotower.planner.question import Question
    from twotower.towers.config.model_config import TwoTowerConfig

# A map has these as its axes.
_AXES = {
    "batch": "batches",
    "gamma": "tokens-per-pass",
    "text": "tokens-per-pass",
    "tokens_per_nfe": "tokens-per-pass",
}


def plan(
    gpu: Annotated[str, typer.Option(help="a100-80, h100, h200, b200, l40s or gb10.")] = "h100",
    context: Annotated[
        int, typer.Option(help="Tokens of a row, prompt and output together.")
    ] = 4096,
    batch: Annotated[
        int | None, typer.Option(help="Rows that a denoiser works on at once; 64 if left out.")
    ] = None,
    gamma: Annotated[
        float | None,
        typer.Option(
            help="Threshold, from which follow the tokens a denoiser pass commits; 0.8 if left out."
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(help="What is written: plain (if left out), open, code or arithmetic."),
    ] = None,
    tokens_per_nfe: Annotated[
        float | None, typer.Option(help="Tokens a pass commits, in place of gamma and text.")
    ] = None,
    output_tokens: Annotated[
        int | None,
        typer.Option(
            help="Output of a row; the rest is a prompt to be read. Not given: no prompt."
        ),
    ] = None,
    experts: Annotated[
        str, typer.Option(help="Format of routed experts: full, fp8 or both.")
    ] = "both",
    most_denoisers: Annotated[
        int, typer.Option(help="Most denoisers of a context tower; 7 fill a host of 8 GPUs.")
    ] = 7,
    model: Annotated[
        str | None, typer.Option(help="Checkpoint; the released 30B model's shape if left out.")
    ] = None,
    measured: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            help="Report of `twotower bench`, or pair stats; a folder stands for its .json files. "
            "Several reports, of one kind of GPU, count together.",
        ),
    ] = None,
    map_file: Annotated[
        Path | None,
        typer.Option(
            "--map",
            dir_okay=False,
            help="SVG or PNG to draw: which placement gives most tokens/s per GPU over rows and "
            "tokens per pass. Needs matplotlib, of the extra `bench`.",
        ),
    ] = None,
    batches: Annotated[
        str | None,
        typer.Option(help="Rows of a map: 1,2,4,...,256 if left out; `...` goes on by doubling."),
    ] = None,
    tokens_per_pass: Annotated[
        str | None,
        typer.Option(help="Tokens per pass of a map, in steps of 0.5 or listed; 1..8 if left out."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Memory and tokens/s of ways to place the towers on a kind of GPU; needs no GPU itself."""
    from twotower.planner.measured import read_all
    from twotower.planner.question import Question, formats_named, model_config

    load = {"batch": batch, "gamma": gamma, "text": text, "tokens_per_nfe": tokens_per_nfe}
    axes = {"batches": batches, "tokens_per_pass": tokens_per_pass}
    _check_axes(map_file, load, axes)
    question = Question(
        gpu=gpu,
        context=context,
        output_tokens=output_tokens,
        experts=formats_named(experts),
        most_denoisers=most_denoisers,
        **_given(load),
    )
    with hub_bars():
        config = model_config(model)
    known = read_all(measured or (), config, question)
    if map_file is not None:
        typer.echo(_mapped(map_file, question, config, known, axes, as_json=as_json))
    else:
        typer.echo(_planned(question, config, known, as_json=as_json))


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
