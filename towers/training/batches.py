"""Draws the tokens and masks of a training step; all draws come from the caller's generator."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor

from twotower.towers.training.corpus import TokenArray


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


@dataclass(frozen=True)
class MaskedBlocks:
    """`masked` [R, m, L] bool, and `timesteps` [R, m] fp32, each block's share of masked tokens."""

    masked: Tensor
    timesteps: Tensor


def draw_sequences(stream: TokenArray, rows: int, length: int, generator: Generator) -> Tensor:
    """Sequences int64 [rows, length] at random offsets of the stream."""
    starts = torch.randint(len(stream) - length + 1, (rows,), generator=generator)
    picked = np.stack([stream[start : start + length] for start in starts.tolist()])
    return torch.from_numpy(picked.astype(np.int64))


def draw_rows(rows: TokenArray, count: int, generator: Generator) -> Tensor:
    """Random rows int64 [count, length] of a table [N, length]."""
    picked = torch.randint(len(rows), (count,), generator=generator)
    return torch.from_numpy(rows[picked.numpy()].astype(np.int64))


def draw_masks(
    rows: int, blocks: int, block_size: int, suffix_share: float, generator: Generator
) -> MaskedBlocks:
    """Masks n of L positions per block, n uniform in 1..L, t = n / L: the timesteps of decoding.

    A `suffix_share` of the blocks has its last n positions masked, as a block decoded from left to
    right so far; the others have random positions masked.
    """
    shape = (rows, blocks)
    counts = torch.randint(1, block_size + 1, shape, generator=generator)
    order = torch.rand((*shape, block_size), generator=generator)
    suffix = torch.rand(shape, generator=generator) < suffix_share
    from_end = torch.arange(block_size, 0, -1, dtype=order.dtype)
    order = torch.where(suffix[..., None], from_end, order)
    rank = order.argsort(dim=-1).argsort(dim=-1)
    return MaskedBlocks(rank < counts[..., None], counts.float() / block_size)


def fixed_masks(
    rows: int, blocks: int, block_size: int, count: int, generator: Generator
) -> MaskedBlocks:
    """Masks exactly `count` random positions in every block."""
    order = torch.rand((rows, blocks, block_size), generator=generator)
    rank = order.argsort(dim=-1).argsort(dim=-1)
    return MaskedBlocks(rank < count, torch.full((rows, blocks), count / block_size))
