"""What a training run starts from and reads, and its record for the model card."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from twotower.towers.config.model_config import TwoTowerConfig
from twotower.towers.training.corpus import TokenArray
from twotower.towers.training.loop import Phase
from twotower.towers.training.options import TrainingOptions
from twotower.towers.training.own_data import OwnText
from twotower.towers.training.parameters import Parameters


@dataclass(frozen=True)
class Data:
    """Tokenizer, token streams [tokens] uint16, and counts of files, characters and bytes for the
    model card."""

    tokenizer: Tokenizer
    train: TokenArray
    held_out: TokenArray
    figures: dict[str, int]


@dataclass(frozen=True)
class Start:
    """A model whose towers are trained on: config, fp32 parameters, tokenizer, and the record of
    its training if it has one."""

    config: TwoTowerConfig
    params: Parameters
    tokenizer: Tokenizer
    record: dict[str, Any] | None


def write_record(
    options: TrainingOptions,
    data: Data,
    start: Start | None,
    own: OwnText,
    phases: Sequence[Phase],
) -> None:
    """Writes training.json for the model card: corpus, phases with their speed, machine, batch,
    masks, and under `start` the record of the model that was trained on."""
    record: dict[str, Any] = {
        "corpus": {
            **data.figures,
            "python": platform.python_version(),
            "train_tokens": len(data.train),
            "held_out_tokens": len(data.held_out),
        },
        "own_text": {
            "rows": len(own.rows),
            "rows_with_own_blocks": len(own.contexts),
            "length": options.shape.length,
            "from": options.own_text_from,
            "share": options.own_text_share,
            "own_block_share": options.own_block_share,
        },
        "phases": {phase.name: phase.record.as_dict() for phase in phases if phase.record.steps},
        "machine": {
            "processor": _processor(),
            "threads": options.threads,
            "dtype": options.dtype,
            "compiled": options.compile,
            "torch": torch.__version__,
        },
        "batch": {"rows": options.shape.rows, "length": options.shape.length},
        "suffix_share": options.suffix_share,
        "draft_share": options.draft_share,
        "position_decay": options.position_decay,
        "rate": options.rate,
        "seed": options.seed,
    }
    if start is not None:
        record["start"] = start.record
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
