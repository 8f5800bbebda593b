"""The options of `twotower plan`: which placement of the towers fits a kind of GPU, how fast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twotower.cli import commands


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
    lookup_tokens: Annotated[
        float | None,
        typer.Option(
            help="Tokens that a round of lookups yields with drafts of 15; 1.6 if left out, what "
            "a small model gave at temperature 0.7: no large one has been measured."
        ),
    ] = None,
    cycle_tokens: Annotated[
        float | None,
        typer.Option(
            help="Tokens that a draft of the denoiser and its check yield; 3.1 if left out, what "
            "a small model gave."
        ),
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
    settings = {
        "gpu": gpu,
        "context": context,
        "output_tokens": output_tokens,
        "experts": experts,
        "most_denoisers": most_denoisers,
        "lookup_tokens": lookup_tokens,
    }
    load = {
        "batch": batch,
        "gamma": gamma,
        "text": text,
        "tokens_per_nfe": tokens_per_nfe,
        "cycle_tokens": cycle_tokens,
    }
    axes = {"batches": batches, "tokens_per_pass": tokens_per_pass}
    commands.plan(settings, load, axes, model, measured or [], map_file, as_json)
