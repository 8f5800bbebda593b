"""Rows of different lengths side by side, without padding.

Tokens of all rows of a pass stand in one [T, ...] tensor. What mixes tokens of a row (conv, scan,
attention) works on runs of neighbouring rows of equal length, or row by row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor


@dataclass(frozen=True)
class Run:
    """`count` neighbouring rows of `length` tokens each, from row `row`, token `token` on."""

    row: int
    count: int
    token: int
    length: int

    def take(self, packed: Tensor) -> Tensor:
        """packed [T, ...] -> this run's part as [count, length, ...], a view."""
        part = packed[self.token : self.token + self.count * self.length]
        return part.view(self.count, self.length, *part.shape[1:])

    @property
    def rows(self) -> range:
        return range(self.row, self.row + self.count)


class Packing:
    """Where each row's tokens stand."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = tuple(lengths)
        self.runs = tuple(_runs(self.lengths))
        starts = [0]
        for length in self.lengths:
            starts.append(starts[-1] + length)
        self.starts = tuple(starts)
        self._row_of_token: Tensor | None = None

    @property
    def total(self) -> int:
        return self.starts[-1]

    def slice_of(self, row: int) -> slice:
        return slice(self.starts[row], self.starts[row + 1])

    def spread(self, per_row: Tensor) -> Tensor:
        """per_row [B, ...] -> one entry per token, [T, ...]; [1, ...] for a single row."""
        if len(self.lengths) == 1:
            return per_row
        if self._row_of_token is None:
            rows = [row for row, length in enumerate(self.lengths) for _ in range(length)]
            self._row_of_token = torch.tensor(rows, device=per_row.device)
        return per_row.index_select(0, self._row_of_token)


def _runs(lengths: Sequence[int]) -> Iterator[Run]:
    row = token = 0
    for length, members in groupby(lengths):
        count = len(list(members))
        yield Run(row, count, token, length)
        row += count
        token += count * length
