"""The two training objectives, and their values on held-out text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.towers.config.model_config import TwoTowerConfig
from twotower.towers.training.batches import (
    BatchShape,
    MaskedBlocks,
    MaskRule,
    draw_masks,
    draw_sequences,
    fixed_masks,
)
from twotower.towers.training.corpus import TokenArray
from twotower.towers.training.model import Loads, context_hidden, denoiser_hidden
from twotower.towers.training.operators import PLAIN, Operators
from twotower.towers.training.parameters import CONTEXT_HEAD, DENOISER_HEAD

HELD_OUT_SEED = 20240607
# Held-out losses are over random masks, whatever the training is over.
SCATTERED = MaskRule(suffix_share=0.0)


@dataclass(frozen=True)
class Objective:
    """The settings of both losses: shapes of model and batch, and the operators that compute."""

    config: TwoTowerConfig
    shape: BatchShape
    operators: Operators = PLAIN


def context_loss(
    objective: Objective, params: Mapping[str, Tensor], tokens: Tensor, loads: Loads | None = None
) -> Tensor:
    """Mean next-token loss in nats of `tokens` int64 [R, T + 1], T whole blocks."""
    hidden, _ = context_hidden(
        params,
        objective.config,
        tokens[:, :-1],
        objective.shape.block_size,
        objective.operators,
        loads,
    )
    logits = F.linear(hidden.flatten(0, 1), params[CONTEXT_HEAD])
    return objective.operators.cross_entropy(logits, tokens[:, 1:].flatten())


def denoiser_loss(
    objective: Objective,
    context: Mapping[str, Tensor],
    params: Mapping[str, Tensor],
    tokens: Tensor,
    masks: MaskedBlocks,
    loads: Loads | None = None,
    own_blocks: Tensor | None = None,
) -> Tensor:
    """Mean loss in nats over the masked positions of all blocks but the first of `tokens` [R, T],
    weighted as `masks` says.

    The first block has no context, which never happens in decoding; `masks` covers the others.
    `own_blocks` [R', m, L] take the place of the blocks of the last R' rows, as other
    continuations of the same contexts.
    """
    size = objective.shape.block_size
    with torch.no_grad():
        _, memory = context_hidden(context, objective.config, tokens, size, objective.operators)
    blocks = tokens.view(len(tokens), -1, size)[:, 1:]
    if own_blocks is not None:
        blocks = torch.cat([blocks[: len(blocks) - len(own_blocks)], own_blocks])
    hidden = denoiser_hidden(
        params,
        objective.config,
        blocks.masked_fill(masks.masked, objective.config.mask_token_id),
        masks.timesteps,
        memory.from_block(1),
        torch.arange(size, tokens.shape[1], size),
        objective.operators,
        loads,
    )
    # Logits of masked positions only, which halves the cost of the head.
    logits = F.linear(hidden[masks.masked], params[DENOISER_HEAD])
    weights = masks.weights[masks.masked]
    return objective.operators.cross_entropy(logits, blocks[masks.masked], weights)


@torch.no_grad()
def held_out_context(
    objective: Objective, params: Mapping[str, Tensor], stream: TokenArray, batches: int
) -> float:
    """Mean next-token loss in nats on fixed sequences of the held-out stream."""
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    shape = objective.shape
    total = 0.0
    for _ in range(batches):
        tokens = draw_sequences(stream, shape.rows, shape.length + 1, generator)
        total += context_loss(objective, params, tokens).item()
    return total / batches


@torch.no_grad()
def held_out_denoiser(
    objective: Objective,
    context: Mapping[str, Tensor],
    params: Mapping[str, Tensor],
    stream: TokenArray,
    batches: int,
    masked_count: int | None = None,
) -> float:
    """Mean masked loss in nats on the same sequences as `held_out_context`.

    Every block has `masked_count` random positions masked, or a uniformly drawn number of them.
    """
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    drawn = torch.Generator().manual_seed(HELD_OUT_SEED + 1)
    shape = objective.shape
    blocks = shape.length // shape.block_size - 1
    total = 0.0
    for _ in range(batches):
        tokens = draw_sequences(stream, shape.rows, shape.length + 1, generator)[:, :-1]
        if masked_count is None:
            masks = draw_masks(shape.rows, blocks, shape.block_size, SCATTERED, drawn)
        else:
            masks = fixed_masks(shape.rows, blocks, shape.block_size, masked_count, drawn)
        total += denoiser_loss(objective, context, params, tokens, masks).item()
    return total / batches
