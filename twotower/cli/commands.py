"""Work of the `twotower` commands, called with their parsed options.

Heavy imports happen inside, so that a command brings no more than it needs.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from twotower.cli.progress import hub_bars, restore_terminal, working

if TYPE_CHECKING:
    from twotower.deployments.config import ServiceConfig


def serve(
    config: Path | None, settings: dict[str, Any], api_keys: Path | None, verbose: bool
) -> None:
    """Starts the service with a file's settings and those given, until a signal stops it.

    The keys of a file of keys are those of the service, in place of the settings'.
    """
    from twotower.cluster.placement.surroundings import runtime_folder
    from twotower.deployments.server.supervisor import held_signals, supervise

    with held_signals() as held, runtime_folder(os.environ) as folder:
        # Its libraries look for their folders when they are imported.
        from twotower.deployments.access.key_file import read_keys
        from twotower.deployments.config import ServiceConfig

        if api_keys is not None:
            settings = {**settings, "api_keys": read_keys(api_keys)}
        service_config = (
            ServiceConfig.from_settings(settings)
            if config is None
            else ServiceConfig.from_file(config, **settings)
        )
        typer.echo("starting the towers ...", err=True)
        work = partial(_run_service, service_config, folder, verbose)
        try:
            code = supervise(work, service_config.graceful_shutdown_timeout_s, held)
        finally:
            # Of a process that is killed while it starts.
            restore_terminal()
    raise typer.Exit(code)


def _run_service(
    config: ServiceConfig, folder: Path, verbose: bool, ready: Callable[[], None]
) -> int:
    """Runs the service in this process until SIGINT or SIGTERM; returns the exit code."""
    from twotower.deployments.router.waiting import WaitingPairs
    from twotower.deployments.server.ray_messages import RayMessages
    from twotower.deployments.server.server import LocalService

    stdout = sys.stdout
    messages = stdout if verbose else RayMessages(sys.stderr)
    with (
        redirect_stdout(messages),
        WaitingPairs(lambda line: typer.echo(line, err=True)),
        ExitStack() as made,
    ):
        with working("starting", wanted=not verbose) as bar:
            service = made.enter_context(
                LocalService(config, verbose=verbose, folder=folder, phase=bar.note)
            )
        # Ray sets a handler of SIGTERM when it starts, so this comes after it.
        stop = _stop_signals()
        ready()
        command = f"twotower generate 'def main():' --target {service.address}"
        typer.echo(f"ready on {service.address}   try: {command}", file=stdout)
        while os.read(stop, 1)[0] not in (signal.SIGINT, signal.SIGTERM):
            pass
        typer.echo("stopping ...", err=True)
    return 0


def _stop_signals() -> int:
    """A descriptor from which a byte can be read for each SIGINT and SIGTERM from now on.

    Not an event that a handler sets: the handler may interrupt a wait for the event that holds the
    event's lock, and it does not run while another thread has got the signal.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, lambda *_: None)
    signal.set_wakeup_fd(writer)
    return reader


def verify(folder: Path, device: str, dtype: str) -> None:
    """Replays recorded cases; ends with exit code 1 if one differs."""
    with working("verifying", "pieces") as bar:
        from twotower.towers.verify import verify_folder

        held = verify_folder(folder, device, dtype, bar.say, progress=bar)
    if not held:
        raise typer.Exit(1)


def quantize(source: str, target: Path, evaluate: bool, device: str, dtype: str) -> None:
    """Writes a quantized checkpoint, and a report to stdout."""
    from twotower.agreement import compare
    from twotower.towers.checkpoint.quantization import quantize_checkpoint
    from twotower.towers.checkpoint.weights import parse_device, parse_dtype, resolve_checkpoint
    from twotower.towers.text.tokenizer import load_tokenizer

    with hub_bars():
        folder = resolve_checkpoint(source)
    # Here and not after an hour of work.
    parse_device(device)
    parse_dtype(dtype)
    if evaluate and load_tokenizer(folder) is None:
        raise ValueError(f"--evaluate: {folder} has no tokenizer for its prompts")
    with working("quantizing", "bytes") as bar:
        report = quantize_checkpoint(folder, target, progress=bar)
    typer.echo(report.table(), err=True)
    figures = asdict(report)
    if evaluate:
        with working("decoding with both checkpoints"):
            figures["evaluation"] = asdict(compare(folder, target, device=device, dtype=dtype))
    typer.echo(json.dumps(figures, indent=2))


def train(settings: dict[str, Any]) -> None:
    """Trains a model."""
    with working("training") as bar:
        from twotower.towers.training import TrainingOptions, train

        train(TrainingOptions(**settings), bar.say, shown=bar)


def bench(arguments: Sequence[str]) -> None:
    """Measures both towers; ends with the exit code of the measurements."""
    from twotower.bench.command import main as measure

    raise typer.Exit(measure(arguments, "twotower bench", lambda: working("measuring", "pieces")))


def plan(
    settings: dict[str, Any],
    load: dict[str, Any],
    axes: dict[str, str | None],
    model: str | None,
    measured: Sequence[Path],
    map_file: Path | None,
    as_json: bool,
) -> None:
    """Prints what fits on a kind of GPU and how fast it would be, or draws a map of it."""
    from twotower.cli.planning import planned

    typer.echo(planned(settings, load, axes, model, measured, map_file, as_json))
