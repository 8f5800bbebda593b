"""`twotower eval`: its options, and a run of lm-eval's tasks or of the model card's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twotower.cli.options import ApiKey, Device, Dtype, Model
from twotower.cli.progress import hub_bars, working

if TYPE_CHECKING:
    from twotower.evaluation.card import CardTask
    from twotower.evaluation.lm_eval_model import TwoTowerLM
    from twotower.evaluation.run import Question

    # Loads the model for as long as a block runs.
    OpenedModel = Callable[[], AbstractContextManager[TwoTowerLM]]


def evaluate(
    tasks: Annotated[
        str | None, typer.Option(help="Tasks, groups or tags of lm-eval; TASK[,TASK].")
    ] = None,
    card: Annotated[
        bool,
        typer.Option(
            "--card",
            help="The released model's card: lists its tasks; with --tasks runs these of them, or "
            "all for `all`, with the card's shots.",
        ),
    ] = False,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder of further task files; no network is needed then.")
    ] = None,
    mode: Annotated[
        str,
        typer.Option(help="How texts are written: mask_diffusion, verified, auto, ar or mock_ar."),
    ] = "mask_diffusion",
    model: Model = None,
    target: Annotated[
        str | None, typer.Option(help="host:port of a running service; otherwise in process.")
    ] = None,
    api_key: ApiKey = None,
    likelihood: Annotated[
        str,
        typer.Option(
            help="Which tower judges given texts: context, or denoiser (a lower bound, in process)."
        ),
    ] = "context",
    samples: Annotated[int, typer.Option(help="Masks of a block for the denoiser's bound.")] = 32,
    limit: Annotated[
        float | None, typer.Option(help="Documents of each task; below 1 their share.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples before each question; each task's own if left out.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows, or calls of a service, at a time.")] = 16,
    max_tokens: Annotated[
        int, typer.Option(help="Most tokens of a text, for tasks that set no length.")
    ] = 256,
    param: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="A parameter of generation, as confidence_threshold=0.9 or acceptance=mix; may be "
            "given several times. What a task sets goes first.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(dir_okay=False, help="JSON file for lm-eval's results.")
    ] = None,
    log_samples: Annotated[
        bool, typer.Option("--log-samples", help="Also every document and answer, beside it.")
    ] = False,
    run_code: Annotated[
        bool,
        typer.Option(
            "--confirm-run-unsafe-code",
            help="Let HumanEval, MBPP and the like run what the model has written.",
        ),
    ] = False,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
) -> None:
    """Run lm-eval's tasks; stdout gets its table and what it cost. Needs the extra `eval`."""
    from twotower.towers.errors import InvalidRequestError

    if tasks is None:
        if not card:
            raise InvalidRequestError("tasks", None, "names of tasks, or --card")
        list_card()
        return
    arguments: dict[str, Any] = {
        "pretrained": model,
        "target": target,
        "mode": mode,
        "likelihood": likelihood,
        "samples": samples,
        "batch_size": batch_size,
        "max_tokens": max_tokens,
        "device": device,
        "dtype": dtype,
        "api_key": api_key,
    }
    names = [name.strip() for name in tasks.split(",")]
    settings = {
        "include_path": include_path,
        "limit": limit,
        "log_samples": log_samples,
        "run_code": run_code,
    }
    run = run_card if card else run_tasks
    run(names, num_fewshot, settings, partial(loaded, arguments, param or [], threads), output)


def list_card() -> None:
    """Prints the card's tasks, and what of each is not the card's."""
    from twotower.evaluation.card import read_card, table

    card = read_card()
    typer.echo(table(card))
    for task in card.tasks:
        if task.differs is not None:
            typer.echo(f"{task.title}: {task.differs}")


def run_tasks(
    names: list[str],
    num_fewshot: int | None,
    settings: dict[str, Any],
    opened: OpenedModel,
    output: Path | None,
) -> None:
    """Runs tasks together and prints their table."""
    from twotower.evaluation.run import Question, evaluate, shown, write_results

    question = Question(names, num_fewshot=num_fewshot, **settings)
    with opened() as model:
        results = evaluate(model, question)
    if output is not None:
        write_results(results, output)
    typer.echo(shown(results))


def run_card(
    names: list[str],
    num_fewshot: int | None,
    settings: dict[str, Any],
    opened: OpenedModel,
    output: Path | None,
) -> None:
    """Runs tasks of the card one by one, with its shots unless others are given; `output` gets the
    task's name before its ending. Then prints the card's table with a column of its own."""
    from twotower.evaluation.card import figure, read_card, table
    from twotower.evaluation.run import evaluate, shown, write_results

    card = read_card()
    chosen = card.chosen(names)
    questions = [_card_question(task, num_fewshot, settings) for task in chosen]
    measured: dict[str, float | None] = {}
    with opened() as model:
        for task, question in zip(chosen, questions, strict=True):
            results = evaluate(model, question)
            measured[task.name] = figure(results, task)
            if output is not None:
                write_results(results, output.with_stem(f"{output.stem}.{task.name}"))
            typer.echo(shown(results))
    typer.echo(table(card, measured))


def _card_question(task: CardTask, num_fewshot: int | None, settings: dict[str, Any]) -> Question:
    """Raises InvalidRequestError, before anything is loaded, for a task that would run code."""
    from twotower.evaluation.run import Question
    from twotower.towers.errors import InvalidRequestError

    if task.runs_code and not settings["run_code"]:
        limit = "with --confirm-run-unsafe-code: its score runs what the model has written"
        raise InvalidRequestError("tasks", task.name, limit)
    shots = task.shots if num_fewshot is None else num_fewshot
    return Question(task.tasks, num_fewshot=shots, **settings)


@contextmanager
def loaded(
    arguments: dict[str, Any], params: list[str], threads: int | None
) -> Iterator[TwoTowerLM]:
    """The model of lm-eval's class while the block runs. Raises InvalidRequestError where lm-eval
    is missing."""
    from twotower.evaluation import check_installed

    check_installed()
    from twotower.evaluation.parameters import named_values

    everything = {**arguments, **named_values(params)}
    with working("loading"), hub_bars():
        if threads is not None and arguments["target"] is None:
            import torch

            torch.set_num_threads(threads)
        from twotower.evaluation.lm_eval_model import TwoTowerLM

        model = TwoTowerLM(**everything)
    try:
        yield model
    finally:
        model.backend.close()
