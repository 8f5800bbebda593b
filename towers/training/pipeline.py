"""A training run from start to end: corpus, context tower, text written by it, denoiser, export."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Generator, Tensor

from twotower.towers.state.budget import free_bytes
from twotower.towers.training.allocator import keep_pages
from twotower.towers.training.batches import draw_sequences
from twotower.towers.training.corpus import (
    MIN_CHARACTERS,
    TokenArray,
    encode_files,
    read_corpus,
    standard_library,
)
from twotower.towers.training.export import export_model, load_for_training
from twotower.towers.training.loop import Budget, LossFunction, Phase, Progress
from twotower.towers.training.losses import (
    Objective,
    context_loss,
    denoiser_loss,
    held_out_context,
    held_out_denoiser,
)
from twotower.towers.training.model import Loads, cast_parameters
from twotower.towers.training.operators import PLAIN, compiled_operators
from twotower.towers.training.optimizer import OptimizerSettings
from twotower.towers.training.options import TrainingOptions
from twotower.towers.training.own_data import OwnText, draw_batch, load_own_text, own_text
from twotower.towers.training.parameters import Parameters, initial_context, initial_denoiser
from twotower.towers.training.record import Data, Start, write_record
from twotower.towers.training.tokenizer import plain_text_only, train_tokenizer

Report = Callable[[str], None]

DENOISER_SETTINGS = OptimizerSettings(embedding_rate=0.01)


def train(options: TrainingOptions, report: Report, shown: Progress | None = None) -> Path:
    """Trains both towers, exports them to `options.out_dir` and returns that folder.

    `report` gets lines for a log, `shown` each phase's share of 1 that is done, with its step
    and loss.
    """
    torch.set_num_threads(options.threads)
    # Checked now rather than after hours of work.
    for folder in (options.out_dir, options.work_dir):
        _check_writable(folder)
    start = _start(options)
    if start is not None:
        options = replace(options, config=start.config)
    data = _data(options, start, report)
    touched = min(options.touch_bytes, free_bytes(torch.device("cpu")) // 2)
    if touched and not keep_pages(touched):
        report("memory: this libc keeps no pages; expect uneven steps")
    operators = compiled_operators() if options.compile else PLAIN
    objective = Objective(options.config, options.shape, operators)
    context = _train_context(options, objective, data, start, report, shown)
    frozen = context.cast(options.torch_dtype)
    own = load_own_text(options.work_dir) if options.resume else None
    if own is None:
        own = own_text(options, frozen, data.train, report, shown)
        own.save(options.work_dir)
    denoiser = _train_denoiser(options, objective, data, own, start, context.params, report, shown)
    params = {**context.params, **denoiser.params}
    size = export_model(options.out_dir, options.config, params, data.tokenizer)
    write_record(options, data, start, own, [context, denoiser])
    report(f"exported {size} bytes to {options.out_dir}")
    return options.out_dir


def _start(options: TrainingOptions) -> Start | None:
    """What the run goes on from: None without `start_from`. Raises CheckpointError for a model that
    is not one."""
    if options.start_from is None:
        return None
    path = options.start_from / "training.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return Start(*load_for_training(options.start_from), record)


def _check_writable(folder: Path) -> None:
    """Makes a folder if it is missing. Raises OSError if nothing can be written there."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=folder):
        pass


def _check_length(name: str, tokens: TokenArray, options: TrainingOptions) -> None:
    """Raises ValueError if the stream is shorter than a sequence of the batch."""
    needed = options.shape.length + 1
    if len(tokens) < needed:
        raise ValueError(
            f"corpus: got {len(tokens)} tokens {name}, expected at least {needed}: more .py files "
            f"of {MIN_CHARACTERS} characters or more"
        )


def _data(options: TrainingOptions, start: Start | None, report: Report) -> Data:
    """Reads the corpus, trains the tokenizer on it unless the start has one, and encodes it; all
    from `work_dir` when the run resumes. Raises ValueError for a corpus that is too small."""
    folder = options.work_dir
    paths = [folder / name for name in ("tokenizer.json", "train.npy", "heldout.npy", "data.json")]
    if options.resume and all(path.exists() for path in paths):
        tokenizer = plain_text_only(Tokenizer.from_file(str(paths[0])))
        figures = json.loads(paths[3].read_text(encoding="utf-8"))
        return Data(tokenizer, np.load(paths[1]), np.load(paths[2]), figures)
    files = read_corpus(options.corpus or standard_library())
    train_files = [file for file in files if not file.held_out]
    held_out_files = [file for file in files if file.held_out]
    if not train_files or not held_out_files:
        raise ValueError(
            f"corpus: got {len(train_files)} .py files to train on and {len(held_out_files)} to "
            f"hold out, of {MIN_CHARACTERS} characters or more; expected at least one of each"
        )
    if start is None:
        tokenizer = train_tokenizer((file.text for file in train_files), options.config.vocab_size)
    else:
        tokenizer = start.tokenizer
    data = Data(
        tokenizer,
        encode_files(tokenizer, train_files),
        encode_files(tokenizer, held_out_files),
        {
            "train_files": len(train_files),
            "held_out_files": len(held_out_files),
            "train_characters": sum(len(file.text) for file in train_files),
            "held_out_characters": sum(len(file.text) for file in held_out_files),
            "held_out_bytes": sum(len(file.text.encode("utf-8")) for file in held_out_files),
        },
    )
    _check_length("to train on", data.train, options)
    _check_length("held out", data.held_out, options)
    tokenizer.save(str(paths[0]), pretty=False)
    np.save(paths[1], data.train)
    np.save(paths[2], data.held_out)
    paths[3].write_text(json.dumps(data.figures), encoding="utf-8")
    report(f"corpus: {data.figures}, tokens {len(data.train)} + {len(data.held_out)}")
    return data


def _train_context(
    options: TrainingOptions,
    objective: Objective,
    data: Data,
    start: Start | None,
    report: Report,
    shown: Progress | None,
) -> Phase:
    """Trains the context tower and its head on the corpus, from fresh parameters, those of the
    start, or where an earlier run stopped."""
    generator = Generator().manual_seed(options.seed)
    shape = options.shape
    params = initial_context(options.config, generator)
    if start is not None:
        params = {name: start.params[name] for name in params}
    checkpoint = options.work_dir / "context.pt"
    settings = OptimizerSettings().scaled(options.rate)
    phase = Phase("context", params, settings, generator, checkpoint)
    if options.resume and phase.restore():
        report(f"context: continues at step {phase.record.steps}")

    def loss(params: Parameters, _progress: float, loads: Loads) -> Tensor:
        tokens = draw_sequences(data.train, shape.rows, shape.length + 1, generator)
        return context_loss(objective, params, tokens, loads)

    def held_out(params: Parameters) -> float:
        return held_out_context(objective, params, data.held_out, options.held_out_batches)

    _run(phase, options, options.context_budget, loss, held_out, report, shown)
    return phase


def _train_denoiser(
    options: TrainingOptions,
    objective: Objective,
    data: Data,
    own: OwnText,
    start: Start | None,
    context: Parameters,
    report: Report,
    shown: Progress | None,
) -> Phase:
    """Trains the denoiser with the frozen context tower, on the corpus and then also on text of
    the tower's `own`."""
    generator = Generator().manual_seed(options.seed + 2)
    frozen = {name: value.detach() for name, value in context.items()}
    params = initial_denoiser(options.config, frozen, generator)
    if start is not None:
        params = {name: start.params[name] for name in params}
    settings = DENOISER_SETTINGS.scaled(options.rate)
    phase = Phase("denoiser", params, settings, generator, options.work_dir / "denoiser.pt")
    if options.resume and phase.restore():
        report(f"denoiser: continues at step {phase.record.steps}")
    cast = cast_parameters(frozen, options.torch_dtype)

    def loss(params: Parameters, progress: float, loads: Loads) -> Tensor:
        batch = draw_batch(options, data.train, own, progress, generator)
        return denoiser_loss(
            objective, cast, params, batch.tokens, batch.masks, loads, batch.own_blocks
        )

    def held_out(params: Parameters) -> float:
        return held_out_denoiser(objective, cast, params, data.held_out, options.held_out_batches)

    _run(phase, options, options.denoiser_budget, loss, held_out, report, shown)
    return phase


def _run(
    phase: Phase,
    options: TrainingOptions,
    budget: Budget,
    loss: LossFunction,
    held_out: Callable[[Parameters], float],
    report: Report,
    shown: Progress | None,
) -> None:
    shape = options.shape
    tokens = shape.rows * shape.length
    phase.run(budget, options.torch_dtype, loss, tokens, held_out, report, shown)
