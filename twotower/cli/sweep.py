"""`twotower sweep`: its options, and what it prints.

Heavy imports happen inside, so that a command brings no more than it needs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from twotower.cli.options import Device, Dtype, Model
from twotower.cli.progress import hub_bars, working

Number = TypeVar("Number", int, float)


def sweep(
    prompts: Annotated[
        Path,
        typer.Argument(
            exists=True,
            dir_okay=False,
            help="JSONL with a column `prompt` (and perhaps `reference`), or text: a prompt a "
            "line, or where lines are empty what stands between these.",
        ),
    ],
    model: Model = None,
    modes: Annotated[
        str, typer.Option(help="Modes, with commas between; ar is always decoded.")
    ] = "ar,mask_diffusion,verified",
    strategy: Annotated[
        str,
        typer.Option(
            help="Ways to commit in mask_diffusion: threshold (it alone decides), steps (they "
            "alone do), threshold_steps (every pair of both), or by threshold with a rule named: "
            "released, leftmost, product. Ways to draft in verified, beside its own: lookup, "
            "denoiser, mix and denoiser_mix (relaxed acceptance)."
        ),
    ] = "threshold,steps",
    thresholds: Annotated[
        str, typer.Option(help="Values of confidence_threshold.")
    ] = "0.5,0.7,0.8,0.9,0.95",
    steps: Annotated[str, typer.Option(help="Values of steps_per_block.")] = "2,4,8,16",
    block_sizes: Annotated[str, typer.Option(help="Values of block_size.")] = "8,16,32",
    draft_steps: Annotated[str, typer.Option(help="Values of draft_steps in verified.")] = "1,2",
    mix_ratios: Annotated[
        str, typer.Option(help="Values of mix_ratio for mix and denoiser_mix.")
    ] = "0.3",
    qualities: Annotated[str, typer.Option(help="Values of quality in auto.")] = "ar,near,fast",
    max_tokens: Annotated[int, typer.Option(help="Most tokens to write.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token.")] = 0.0,
    limit: Annotated[
        int | None, typer.Option(help="Take so many prompts; all if left out.")
    ] = None,
    repeats: Annotated[
        int, typer.Option(help="Decode each point so often; the median of tokens/s counts.")
    ] = 1,
    batch: Annotated[int, typer.Option(help="Rows that are decoded together.")] = 16,
    seed: Annotated[int, typer.Option(help="Prompt i draws with this seed + i.")] = 0,
    pass_costs: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Report of `twotower bench`, or costs.json of a sweep, for the speed-up over ar; "
            "measured here if left out.",
        ),
    ] = None,
    score: Annotated[
        str,
        typer.Option(
            help="Task scores, with commas between: next_line or exact against `reference`, or "
            "module:function of prompt, output and reference; none."
        ),
    ] = "none",
    out: Annotated[Path, typer.Option(help="Folder of points and report.")] = Path("runs/sweep"),
    fresh: Annotated[
        bool,
        typer.Option("--fresh/--resume", help="Remove the folder's points, or go on after them."),
    ] = False,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after the end-of-text token.")
    ] = False,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Measure what quality costs: decode prompts at every point of a grid of parameters.

    Writes points.jsonl, sweep.csv, sweep.json and sweep.svg; stdout gets a table. The same command
    goes on where it was interrupted.
    """
    axes = {
        "confidence_threshold": _numbers("thresholds", thresholds, float),
        "steps_per_block": _numbers("steps", steps, int),
        "block_size": _numbers("block_sizes", block_sizes, int),
        "draft_steps": _numbers("draft_steps", draft_steps, int),
        "mix_ratio": _numbers("mix_ratios", mix_ratios, float),
        "quality": _names(qualities),
    }
    settings: dict[str, Any] = {
        "prompts": prompts,
        "out": out,
        "model": model,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "limit": limit,
        "repeats": repeats,
        "batch": batch,
        "seed": seed,
        "scores": tuple(name for name in _names(score) if name != "none"),
        "pass_costs": pass_costs,
        "ignore_eos": ignore_eos,
        "fresh": fresh,
        "device": device,
        "dtype": dtype,
        "threads": threads,
    }
    with working("starting"):
        from twotower.bench.plot import NO_MATPLOTLIB, can_plot
        from twotower.sweep.command import sweep_to_folder
        from twotower.sweep.grid import Grid
        from twotower.sweep.run import SweepOptions

        options = SweepOptions(**settings, grid=Grid(_names(modes), _names(strategy), axes))
    if ":" in score:
        # A function of the user's own is looked for where the command is called.
        sys.path.insert(0, str(Path.cwd()))
    if not can_plot():
        # Said before the points, which take long.
        typer.echo(f"{NO_MATPLOTLIB}; going on without a picture", err=True)
    with hub_bars(), working("sweeping", "pieces") as bar:
        table = sweep_to_folder(options, bar, with_plot=can_plot())
    typer.echo(table)
    typer.echo(f"points, outputs and report are in {out}", err=True)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(name: str, text: str, kind: Callable[[str], Number]) -> tuple[Number, ...]:
    """Numbers with commas between. Raises InvalidRequestError."""
    from twotower.towers.errors import InvalidRequestError

    try:
        return tuple(kind(part) for part in _names(text))
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise InvalidRequestError(name, text, f"{what} with commas between") from None
