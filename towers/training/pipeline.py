"""A training run from start to end: corpus, context tower, text written by it, denoiser, export."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Generator, Tensor

from twotower.towers.state.budget import free_bytes
from twotower.towers.training.allocator import keep_pages
from twotower.towers.training.batches import draw_masks, draw_rows, draw_sequences
from twotower.towers.training.corpus import (
    MIN_CHARACTERS,
    TokenArray,
    encode_files,
    read_corpus,
    standard_library,
)
from twotower.towers.training.export import export_model
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
from twotower.towers.training.own_text import write_own_text
from twotower.towers.training.parameters import Parameters, initial_context, initial_denoiser
from twotower.towers.training.tokenizer import plain_text_only, train_tokenizer

Report = Callable[[str], None]

DENOISER_SETTINGS = OptimizerSettings(embedding_rate=0.01)
OWN_TEXT_TEMPERATURES = (0.0, 0.5, 0.8)
# From this share of the denoiser's phase on, half of the rows are text of the context tower.
OWN_TEXT_FROM = 0.5


@dataclass(frozen=True)
class Data:
    """Tokenizer, token streams [tokens] uint16, and counts of files, characters and bytes for the
    model card."""

    tokenizer: Tokenizer
    train: TokenArray
    held_out: TokenArray
    figures: dict[str, int]


def train(options: TrainingOptions, report: Report, shown: Progress | None = None) -> Path:
    """Trains both towers, exports them to `options.out_dir` and returns that folder.

    `report` gets lines for a log, `shown` each phase's share of 1 that is done, with its step
    and loss.
    """
    torch.set_num_threads(options.threads)
    # Checked now rather than after hours of work.
    for folder in (options.out_dir, options.work_dir):
        _check_writable(folder)
    data = _data(options, report)
    touched = min(options.touch_bytes, free_bytes(torch.device("cpu")) // 2)
    if touched and not keep_pages(touched):
        report("memory: this libc keeps no pages; expect uneven steps")
    operators = compiled_operators() if options.compile else PLAIN
    objective = Objective(options.config, options.shape, operators)
    context = _train_context(options, objective, data, report, shown)
    frozen = context.cast(options.torch_dtype)
    own_text = _own_text(options, frozen, data, report, shown)
    denoiser = _train_denoiser(options, objective, data, own_text, context.params, report, shown)
    params = {**context.params, **denoiser.params}
    size = export_model(options.out_dir, options.config, params, data.tokenizer)
    _write_record(options, data, own_text, context, denoiser)
    report(f"exported {size} bytes to {options.out_dir}")
    return options.out_dir


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


def _data(options: TrainingOptions, report: Report) -> Data:
    """Reads the corpus, trains the tokenizer on it and encodes it; all from `work_dir` when the run
    resumes. Raises ValueError for a corpus that is too small."""
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
    tokenizer = train_tokenizer((file.text for file in train_files), options.config.vocab_size)
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
    report: Report,
    shown: Progress | None,
) -> Phase:
    """Trains the context tower and its head on the corpus, from fresh parameters or where an
    earlier run stopped."""
    generator = Generator().manual_seed(options.seed)
    shape = options.shape
    params = initial_context(options.config, generator)
    checkpoint = options.work_dir / "context.pt"
    phase = Phase("context", params, OptimizerSettings(), generator, checkpoint)
    if options.resume and phase.restore():
        report(f"context: continues at step {phase.record.steps}")

    def loss(params: Parameters, _progress: float, loads: Loads) -> Tensor:
        tokens = draw_sequences(data.train, shape.rows, shape.length + 1, generator)
        return context_loss(objective, params, tokens, loads)

    def held_out(params: Parameters) -> float:
        return held_out_context(objective, params, data.held_out, options.held_out_batches)

    _run(phase, options, options.context_budget, loss, held_out, report, shown)
    return phase


def _own_text(
    options: TrainingOptions,
    frozen: Parameters,
    data: Data,
    report: Report,
    shown: Progress | None,
) -> TokenArray:
    """Rows uint16 [N, length] written by the context tower for `own_text_minutes`, at least one
    batch; read from `work_dir` when the run resumes."""
    path = options.work_dir / "own_text.npy"
    if options.resume and path.exists():
        return np.asarray(np.load(path), dtype=np.uint16)
    generator = Generator().manual_seed(options.seed + 1)
    temperatures = torch.tensor(OWN_TEXT_TEMPERATURES).repeat(options.own_text_rows)
    temperatures = temperatures[: options.own_text_rows]
    shape, batches = options.shape, list[TokenArray]()
    until = time.monotonic() + options.own_text_minutes * 60
    while not batches or time.monotonic() < until:
        prompts = draw_sequences(
            data.train, options.own_text_rows, options.own_text_prompt, generator
        )
        rows = write_own_text(
            frozen,
            options.config,
            prompts,
            shape.length,
            shape.block_size,
            temperatures,
            generator,
        )
        batches.append(rows.numpy().astype(np.uint16))
        report(f"own text: {len(batches) * options.own_text_rows} rows of {shape.length}")
        if shown is not None:
            left = max(0.0, until - time.monotonic())
            seconds = options.own_text_minutes * 60
            shown(max(0.0, seconds - left), seconds, "writing own text")
    written = np.concatenate(batches)
    np.save(path, written)
    return written


def _train_denoiser(
    options: TrainingOptions,
    objective: Objective,
    data: Data,
    own_text: TokenArray,
    context: Parameters,
    report: Report,
    shown: Progress | None,
) -> Phase:
    """Trains the denoiser with the frozen context tower, on the corpus and then also on
    `own_text`."""
    generator = Generator().manual_seed(options.seed + 2)
    shape = options.shape
    frozen = {name: value.detach() for name, value in context.items()}
    params = initial_denoiser(options.config, frozen, generator)
    phase = Phase(
        "denoiser", params, DENOISER_SETTINGS, generator, options.work_dir / "denoiser.pt"
    )
    if options.resume and phase.restore():
        report(f"denoiser: continues at step {phase.record.steps}")
    cast = cast_parameters(frozen, options.torch_dtype)
    blocks = shape.length // shape.block_size - 1

    def loss(params: Parameters, progress: float, loads: Loads) -> Tensor:
        written = shape.rows // 2 if progress >= OWN_TEXT_FROM else 0
        tokens = draw_sequences(data.train, shape.rows - written, shape.length, generator)
        if written:
            tokens = torch.cat([tokens, draw_rows(own_text, written, generator)])
        masks = draw_masks(shape.rows, blocks, shape.block_size, options.suffix_share, generator)
        return denoiser_loss(objective, cast, params, tokens, masks, loads)

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


def _write_record(
    options: TrainingOptions, data: Data, own_text: TokenArray, context: Phase, denoiser: Phase
) -> None:
    """Writes training.json for the model card: corpus, phases with their speed, machine, batch."""
    record: dict[str, Any] = {
        "corpus": {
            **data.figures,
            "python": platform.python_version(),
            "train_tokens": len(data.train),
            "held_out_tokens": len(data.held_out),
        },
        "own_text": {"rows": len(own_text), "length": options.shape.length},
        "phases": {phase.name: phase.record.as_dict() for phase in (context, denoiser)},
        "machine": {
            "processor": _processor(),
            "threads": options.threads,
            "dtype": options.dtype,
            "compiled": options.compile,
            "torch": torch.__version__,
        },
        "batch": {"rows": options.shape.rows, "length": options.shape.length},
        "suffix_share": options.suffix_share,
        "seed": options.seed,
    }
    text = json.dumps(record, indent=1) + "\n"
    (options.out_dir / "training.json").write_text(text, encoding="utf-8")


def _processor() -> str:
    """The CPU's model and its bf16 instructions from /proc/cpuinfo, else platform's name of it."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    lines = {
        key.strip(): value.strip()
        for key, _, value in (line.partition(":") for line in info.read_text().splitlines())
    }
    bf16 = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in lines.get("flags", "")]
    return ", ".join([lines.get("model name", platform.machine()), *bf16])
