"""The denoiser's share of text that the context tower wrote: written once, drawn at every step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor

from twotower.towers.training.batches import MaskedBlocks, draw_masks, draw_rows, draw_sequences
from twotower.towers.training.corpus import TokenArray
from twotower.towers.training.loop import Progress
from twotower.towers.training.options import TrainingOptions
from twotower.towers.training.own_text import write_own_blocks, write_own_text
from twotower.towers.training.parameters import Parameters

# In turn over the rows of a batch. Of own blocks half are greedy: greedy drafts are the longest.
OWN_TEXT_TEMPERATURES = (0.0, 0.5, 0.8)
OWN_BLOCK_TEMPERATURES = (0.0, 0.0, 0.5, 0.8)
# Rows whose own blocks are written at a time: each needs the states at all of its borders.
_BLOCK_ROWS = 64

Report = Callable[[str], None]


@dataclass(frozen=True)
class OwnText:
    """What the context tower wrote, uint16: `rows` [N, T], and `blocks` [M, m, L] that continue the
    corpus text `contexts` [M, T] at each of its block borders."""

    rows: TokenArray
    contexts: TokenArray
    blocks: TokenArray

    def save(self, folder: Path) -> None:
        """Writes one file for each array."""
        for name, path in _paths(folder).items():
            np.save(path, getattr(self, name))


@dataclass(frozen=True)
class DenoiserBatch:
    """`tokens` int64 [R, T], masks of all rows, and the own blocks int64 [R', m, L] of the last R'
    rows, see `denoiser_loss`."""

    tokens: Tensor
    masks: MaskedBlocks
    own_blocks: Tensor


def load_own_text(folder: Path) -> OwnText | None:
    """What `OwnText.save` wrote; None if a file is missing."""
    paths = _paths(folder)
    if not all(path.exists() for path in paths.values()):
        return None
    return OwnText(
        **{name: np.asarray(np.load(path), dtype=np.uint16) for name, path in paths.items()}
    )


def own_text(
    options: TrainingOptions,
    frozen: Parameters,
    stream: TokenArray,
    report: Report,
    shown: Progress | None,
) -> OwnText:
    """Text written by the context tower `frozen` from prompts of the stream for
    `own_text_minutes`; of rows and of blocks at least one batch each, if any step draws them."""
    generator = Generator().manual_seed(options.seed + 1)
    shape = options.shape
    row_share, block_share = options.own_text_share, options.own_block_share
    seconds, began = options.own_text_minutes * 60, time.monotonic()
    rows = [np.zeros((0, shape.length), np.uint16)]
    contexts = rows[:1]
    blocks = [np.zeros((0, shape.later_blocks, shape.block_size), np.uint16)]

    def told() -> None:
        report(f"own text: {sum(map(len, rows))} rows, {sum(map(len, contexts))} with own blocks")
        if shown is not None:
            shown(min(seconds, time.monotonic() - began), seconds, "writing own text")

    rows_until = began + seconds * row_share / max(row_share + block_share, 1e-9)
    while row_share and (len(rows) == 1 or time.monotonic() < rows_until):
        rows.append(_write_rows(options, frozen, stream, generator))
        told()
    while block_share and (len(blocks) == 1 or time.monotonic() < began + seconds):
        context, written = _write_blocks(options, frozen, stream, generator)
        contexts.append(context)
        blocks.append(written)
        told()
    return OwnText(np.concatenate(rows), np.concatenate(contexts), np.concatenate(blocks))


def _write_rows(
    options: TrainingOptions, frozen: Parameters, stream: TokenArray, generator: Generator
) -> TokenArray:
    """A batch of `own_text_rows` rows, of which the context tower wrote all but the prompts."""
    rows, shape = options.own_text_rows, options.shape
    prompts = draw_sequences(stream, rows, options.own_text_prompt, generator)
    written = write_own_text(
        frozen,
        options.config,
        prompts,
        shape.length,
        shape.block_size,
        _in_turn(OWN_TEXT_TEMPERATURES, rows),
        generator,
    )
    return written.numpy().astype(np.uint16)


def _write_blocks(
    options: TrainingOptions, frozen: Parameters, stream: TokenArray, generator: Generator
) -> tuple[TokenArray, TokenArray]:
    """A batch of contexts [M, T] from the stream, and the context tower's blocks [M, m, L]."""
    rows, shape = min(_BLOCK_ROWS, options.own_text_rows), options.shape
    contexts = draw_sequences(stream, rows, shape.length, generator)
    temperatures = _in_turn(OWN_BLOCK_TEMPERATURES, rows)
    blocks = write_own_blocks(
        frozen, options.config, contexts, shape.block_size, temperatures, generator
    )
    return contexts.numpy().astype(np.uint16), blocks.numpy().astype(np.uint16)


def _in_turn(temperatures: Sequence[float], rows: int) -> Tensor:
    """The temperatures again and again, fp32 [rows]."""
    return torch.tensor(temperatures).repeat(rows)[:rows]


def draw_batch(
    options: TrainingOptions,
    stream: TokenArray,
    own: OwnText,
    progress: float,
    generator: Generator,
) -> DenoiserBatch:
    """A step's rows at the share `progress` of the denoiser's time: corpus text, own text, and own
    blocks after corpus text."""
    shape = options.shape
    begun = progress >= options.own_text_from
    rows, with_blocks = (
        int(shape.rows * share) if begun else 0
        for share in (options.own_text_share, options.own_block_share)
    )
    corpus = shape.rows - rows - with_blocks
    # One draw for contexts and blocks, which belong together.
    picked = torch.randint(max(1, len(own.blocks)), (with_blocks,), generator=generator).numpy()
    tokens = torch.cat(
        [
            draw_sequences(stream, corpus, shape.length, generator),
            draw_rows(own.rows, rows, generator) if rows else _tokens(own.rows[:0]),
            _tokens(own.contexts[picked]),
        ]
    )
    size = (shape.later_blocks, shape.block_size)
    masks = draw_masks(corpus, *size, options.corpus_masks, generator)
    own_masks = draw_masks(rows + with_blocks, *size, options.own_masks, generator)
    return DenoiserBatch(tokens, masks.above(own_masks), _tokens(own.blocks[picked]))


def _tokens(array: TokenArray) -> Tensor:
    return torch.from_numpy(array.astype(np.int64))


def _paths(folder: Path) -> dict[str, Path]:
    """The file of each array."""
    return {
        "rows": folder / "own_text.npy",
        "contexts": folder / "own_contexts.npy",
        "blocks": folder / "own_blocks.npy",
    }
