"""Rows of different lengths side by side, without padding: what every ragged operator is told.

Tokens of all rows of a pass stand in one [T, ...] tensor. What mixes tokens of a row (conv, scan,
attention) finds there where a row's tokens are, which slot and pages of the pools are its own, and
how much of its context it sees. Kernels read the tensors; references on a CPU read `host`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby, pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rows:
    """B rows of a pass over T tokens.

    `cu_seqlens` [B + 1] int32: row r has tokens cu_seqlens[r]..cu_seqlens[r+1]-1. `slots` [B]
    int32: its slot in the pools; -1 marks padding, a row that is neither computed nor written.
    `context_lens` [B] int32: tokens of its context that attention sees, and where its new K/V would
    go. `pages` [S, P] int32: context token i of slot s stands in page pages[s, i // page_tokens].
    `max_seqlen` bounds the rows' lengths and is the only number that a launch may depend on, beside
    shapes. `real` [T] bool marks the tokens that are not padding, None if there can be no padding.
    """

    cu_seqlens: Tensor
    slots: Tensor
    context_lens: Tensor
    pages: Tensor
    page_tokens: int
    max_seqlen: int
    real: Tensor | None = None
    known: HostRows | None = None

    @classmethod
    def build(
        cls,
        lengths: Sequence[int],
        slots: Sequence[int],
        context_lens: Sequence[int],
        pages: Tensor,
        page_tokens: int,
    ) -> Rows:
        """Rows whose numbers are known on the host, on the device of `pages`."""
        known = HostRows(tuple(accumulate(lengths, initial=0)), tuple(slots), tuple(context_lens))
        flat = torch.tensor([*known.cu_seqlens, *slots, *context_lens], dtype=torch.int32)
        count = len(lengths)
        cu_seqlens, own_slots, seen = flat.to(pages.device).split((count + 1, count, count))
        return cls(cu_seqlens, own_slots, seen, pages, page_tokens, max(lengths), known=known)

    @property
    def count(self) -> int:
        """B, padding included."""
        return self.slots.shape[0]

    @cached_property
    def host(self) -> HostRows:
        """The same as numbers: for references, never inside a CUDA graph."""
        return self.known or HostRows(
            tuple(self.cu_seqlens.tolist()),
            tuple(self.slots.tolist()),
            tuple(self.context_lens.tolist()),
        )

    def pages_of(self, row: int, tokens: int | None = None) -> list[int]:
        """The pages that hold a row's first `tokens`, its visible ones if None."""
        host = self.host
        count = host.context_lens[row] if tokens is None else tokens
        own: list[int] = self.pages[host.slots[row], : -(-count // self.page_tokens)].tolist()
        return own


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


@dataclass(frozen=True)
class HostRows:
    """Starts, slots and visible tokens of a pass's rows as whole numbers."""

    cu_seqlens: tuple[int, ...]
    slots: tuple[int, ...]
    context_lens: tuple[int, ...]

    @property
    def total(self) -> int:
        """T."""
        return self.cu_seqlens[-1]

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in pairwise(self.cu_seqlens))

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """Neighbouring rows of one length, padding left out."""
        return tuple(self._runs())

    def slice_of(self, row: int) -> slice:
        """Where a row's tokens stand."""
        return slice(self.cu_seqlens[row], self.cu_seqlens[row + 1])

    def _runs(self) -> Iterator[Run]:
        kinds = [(length, slot < 0) for length, slot in zip(self.lengths, self.slots, strict=True)]
        row = 0
        for (length, padding), members in groupby(kinds):
            count = len(list(members))
            if not padding:
                yield Run(row, count, self.cu_seqlens[row], length)
            row += count
