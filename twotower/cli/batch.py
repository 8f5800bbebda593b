"""`twotower batch`: its options, its progress, and its summary.

Heavy imports happen inside, so that a command brings no more than it needs.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from twotower.cli.options import ApiKey, Model
from twotower.cli.progress import Bar, is_live, working

if TYPE_CHECKING:
    from twotower.batch.counts import JobCounts
    from twotower.batch.options import JobOptions

# Without a terminal the progress is a line so often.
_LINE_EVERY_S = 30.0
_PAIRS = re.compile(r"(\d+)(?::(\d+))?")
_MISSING = "twotower batch needs Ray Data: pip install 'twotower[batch]'"


def batch(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT... OUTPUT",
            help="Files, folders, globs or URLs of .jsonl, .csv or .parquet (- reads lines from "
            "stdin); last the output, a .jsonl or .parquet file or a folder of parts.",
        ),
    ],
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="URL of a running service's HTTP side, such as http://127.0.0.1:8000; may be "
            "given several times. Without it the job starts a service of its own."
        ),
    ] = None,
    api_key: ApiKey = None,
    model: Model = None,
    config: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="YAML settings of the job's own service."),
    ] = None,
    pairs: Annotated[
        str | None,
        typer.Option(metavar="N[:M]", help="Pairs of its own service; N:M lets them scale."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of each tower of its own service.")
    ] = None,
    max_num_seqs: Annotated[
        int | None, typer.Option(help="Requests that a pair of its own service works on at once.")
    ] = None,
    prompt_column: Annotated[
        str, typer.Option(help="Column of the prompt, in rows that have no request of their own.")
    ] = "prompt",
    max_tokens: Annotated[
        int | None, typer.Option(help="Most tokens to write for rows that do not say it.")
    ] = None,
    mode: Annotated[
        str | None, typer.Option(help="mask_diffusion, ar, verified or mock_ar, likewise.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Likewise.")] = None,
    param: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Any other field of the HTTP API, likewise, its value as JSON: "
            "confidence_threshold=0.9.",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Seed of the job: each row's follows from it and its custom_id.")
    ] = 0,
    output_format: Annotated[
        str | None, typer.Option("--format", help="jsonl or parquet, for a folder as output.")
    ] = None,
    ordered: Annotated[
        bool, typer.Option("--ordered", help="Write the rows of a file in the input's order.")
    ] = False,
    concurrency: Annotated[
        int | None,
        typer.Option(
            help="Requests in flight of each caller; what its own service has room for, or 64."
        ),
    ] = None,
    callers: Annotated[
        str, typer.Option(metavar="N[:M]", help="Processes that make the calls.")
    ] = "1",
    patience: Annotated[
        float, typer.Option(help="Seconds for which a request is tried again before it fails.")
    ] = 600.0,
    rows_per_commit: Annotated[
        int | None, typer.Option(help="Rows that are written together; 1 to 256 by their number.")
    ] = None,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Ask again about the rows that failed.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Throw away what the job has done, and begin again.")
    ] = False,
) -> None:
    """Complete all prompts of a data set: stdout gets a summary as JSON, OUTPUT the rows.

    After an interruption the same command goes on. Rows that cannot be completed are in OUTPUT's
    .errors.jsonl, with the reason, and end nothing.
    """
    if len(paths) < 2:
        raise typer.BadParameter("paths: got one, expected the input and the output")
    body = _fields(param or [], max_tokens=max_tokens, mode=mode, temperature=temperature)
    service = {
        "model": model,
        "num_threads": threads,
        "max_num_seqs": max_num_seqs,
        **_pair_settings(pairs),
    }
    if target and (config or any(value is not None for value in service.values())):
        raise typer.BadParameter(
            "--target asks a running service; --model, --config, --pairs, --threads and "
            "--max-num-seqs are for one of the job's own"
        )
    with _libraries():
        from twotower.batch.options import JobOptions
        from twotower.batch.requests import BatchDefaults
        from twotower.batch.service import file_settings

    options = JobOptions(
        inputs=tuple(paths[:-1]),
        output=paths[-1],
        defaults=BatchDefaults(prompt_column, body, seed),
        targets=tuple(target or ()),
        api_key=api_key,
        service=file_settings(config, service),
        format=_format(output_format),
        concurrency=concurrency,
        callers=_range("callers", callers),
        patience_s=patience,
        rows_per_commit=rows_per_commit,
        ordered=ordered,
        retry_errors=retry_errors,
        fresh=fresh,
    )
    _run(options)


def _run(options: JobOptions) -> None:
    """Runs the job and prints its summary."""
    with _libraries():
        from twotower.batch.job import run_job
        from twotower.deployments.server.ray_messages import RayMessages

    stdout = sys.stdout
    with redirect_stdout(RayMessages(sys.stderr)), working("batch", "pieces") as bar:
        try:
            summary = run_job(options, _shown(bar), bar.note)
        except KeyboardInterrupt:
            typer.echo("the same command goes on", err=True)
            raise typer.Exit(130) from None
    typer.echo(json.dumps(summary.to_dict()), file=stdout)


def _shown(bar: Bar) -> Callable[[JobCounts], None]:
    """Shows a job's progress: on a terminal in its bar, elsewhere in a line from time to time."""
    last = time.monotonic()

    def show(counts: JobCounts) -> None:
        nonlocal last
        bar(counts.done, counts.rows, _figures(counts))
        if not is_live(sys.stderr) and time.monotonic() - last >= _LINE_EVERY_S:
            last = time.monotonic()
            typer.echo(f"{counts.done} of {counts.rows} rows, {_figures(counts)}", err=True)

    return show


def _figures(counts: JobCounts) -> str:
    """Speed, tokens a pass and errors of a job."""
    shown = [f"{counts.tokens_per_s:.0f} tokens/s"]
    if counts.tokens_per_pass is not None:
        shown.append(f"{counts.tokens_per_pass:.2f} a pass")
    if counts.errors:
        shown.append(f"{counts.errors} errors")
    return ", ".join(shown)


def _fields(pairs: Sequence[str], **given: Any) -> dict[str, Any]:
    """Fields of a request's body. Raises BadParameter for what is no NAME=VALUE."""
    fields = {name: value for name, value in given.items() if value is not None}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise typer.BadParameter(f"--param: got {pair!r}, expected NAME=VALUE")
        if name in fields or name == "seed":
            raise typer.BadParameter(f"--param: got {name}, which has an option of its own")
        try:
            fields[name] = json.loads(value)
        except ValueError:
            fields[name] = value
    return fields


def _format(name: str | None) -> Literal["jsonl", "parquet"] | None:
    """A format of output. Raises BadParameter for a name of none."""
    if name in (None, "jsonl", "parquet"):
        return cast(Literal["jsonl", "parquet"] | None, name)
    raise typer.BadParameter(f"--format: got {name!r}, expected jsonl or parquet")


def _pair_settings(pairs: str | None) -> dict[str, Any]:
    """Settings of a service with so many pairs."""
    if pairs is None:
        return {}
    least, most = _range("pairs", pairs)
    if least == most:
        return {"num_pairs": least}
    return {"autoscaling": {"min_pairs": least, "max_pairs": most}}


def _range(name: str, text: str) -> tuple[int, int]:
    """N or N:M. Raises BadParameter for anything else."""
    found = _PAIRS.fullmatch(text)
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= least <= most:
        raise typer.BadParameter(f"--{name}: got {text!r}, expected N or N:M, at least 1")
    return least, most


@contextmanager
def _libraries() -> Iterator[None]:
    """Says which extra lacks where a library does."""
    # Ray reads it when it is imported: a job that is stopped must not start it once more.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    try:
        # Ray Data prints a hint about its progress bars when it is imported.
        with redirect_stdout(io.StringIO()):
            yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("pyarrow", "pandas", "aiohttp", "fsspec"):
            raise typer.BadParameter(_MISSING) from None
        raise
