"""Draws the tokens and masks of a training step; all draws come from the caller's generator."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor

from twotower.towers.training.corpus import TokenArray

# Share of drafts that know no token: a request's first; all others begin with a known one.
WHOLE_DRAFTS = 0.25


@dataclass(frozen=True)
class BatchShape:
    """A batch of `rows` sequences of `length` tokens, cut into blocks of `block_size` for the
    denoiser. Raises ValueError unless `length` is two or more whole blocks."""

    rows: int = 16
    length: int = 256
    block_size: int = 16

    def __post_init__(self) -> None:
        if self.length % self.block_size or self.length < 2 * self.block_size:
            raise ValueError(
                f"length: got {self.length}, expected two or more whole blocks of {self.block_size}"
            )

    @property
    def later_blocks(self) -> int:
        """Blocks of a sequence after its first, which has no context to be denoised from."""
        return self.length // self.block_size - 1


@dataclass(frozen=True)
class MaskRule:
    """How the blocks of a batch are masked and how their masked positions count.

    A `draft_share` of the blocks is masked as a draft of verified decoding is: all positions, or
    all but the first. Of the others a `suffix_share` has its last positions masked, and the rest
    random ones. Where the masks are the end of a block, the k-th of them (from 0) weighs
    `position_decay` ** k, since a draft's token counts only if all before it were accepted.
    """

    suffix_share: float = 0.5
    draft_share: float = 0.0
    position_decay: float = 1.0

    def __post_init__(self) -> None:
        for name in ("suffix_share", "draft_share"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name}: got {value}, expected 0 to 1")
        if not 0.0 < self.position_decay <= 1.0:
            raise ValueError(
                f"position_decay: got {self.position_decay}, expected above 0 and at most 1"
            )


@dataclass(frozen=True)
class MaskedBlocks:
    """`masked` [R, m, L] bool; `timesteps` [R, m] fp32, each block's share of masked tokens; and
    `weights` [R, m, L] fp32 of the positions in the loss."""

    masked: Tensor
    timesteps: Tensor
    weights: Tensor

    def above(self, below: MaskedBlocks) -> MaskedBlocks:
        """The rows of both, these first."""
        return MaskedBlocks(
            torch.cat([self.masked, below.masked]),
            torch.cat([self.timesteps, below.timesteps]),
            torch.cat([self.weights, below.weights]),
        )


def draw_sequences(stream: TokenArray, rows: int, length: int, generator: Generator) -> Tensor:
    """Sequences int64 [rows, length] at random offsets of the stream."""
    starts = torch.randint(len(stream) - length + 1, (rows,), generator=generator)
    picked = stream[starts.numpy()[:, None] + np.arange(length)]
    return torch.from_numpy(picked.astype(np.int64))


def draw_rows(rows: TokenArray, count: int, generator: Generator) -> Tensor:
    """Random rows int64 [count, length] of a table [N, length]."""
    picked = torch.randint(len(rows), (count,), generator=generator)
    return torch.from_numpy(rows[picked.numpy()].astype(np.int64))


def draw_masks(
    rows: int, blocks: int, block_size: int, rule: MaskRule, generator: Generator
) -> MaskedBlocks:
    """Masks n of L positions per block, t = n / L: the timesteps of decoding.

    In a draft n is L once in four times, else L - 1; elsewhere n is uniform in 1..L. A suffix is
    a block decoded from left to right so far.
    """
    shape = (rows, blocks)
    counts = torch.randint(1, block_size + 1, shape, generator=generator)
    order = torch.rand((*shape, block_size), generator=generator)
    suffix = torch.rand(shape, generator=generator) < rule.suffix_share
    draft = torch.rand(shape, generator=generator) < rule.draft_share
    whole = torch.rand(shape, generator=generator) < WHOLE_DRAFTS
    # A block of one token has nothing to know.
    counts = torch.where(draft, (block_size - 1 + whole.long()).clamp_min(1), counts)
    suffix = suffix | draft
    from_end = torch.arange(block_size, 0, -1, dtype=order.dtype)
    order = torch.where(suffix[..., None], from_end, order)
    rank = order.argsort(dim=-1).argsort(dim=-1)
    masked = rank < counts[..., None]
    decayed = rule.position_decay ** (masked.cumsum(-1) - 1)
    weights = torch.where(suffix[..., None], decayed, 1.0)
    return MaskedBlocks(masked, counts.float() / block_size, weights)


def fixed_masks(
    rows: int, blocks: int, block_size: int, count: int, generator: Generator
) -> MaskedBlocks:
    """Masks exactly `count` random positions in every block."""
    order = torch.rand((rows, blocks, block_size), generator=generator)
    rank = order.argsort(dim=-1).argsort(dim=-1)
    masked = rank < count
    timesteps = torch.full((rows, blocks), count / block_size)
    return MaskedBlocks(masked, timesteps, torch.ones(masked.shape))
