"""Rows of different lengths packed without padding, as ragged operators read them.

Tokens of all rows of a pass are in one [T, ...] tensor. Operators that mix tokens of a row (conv,
scan, attention) read from `Rows` which tokens are a row's, which slot and pages of the pools it
has, and how many tokens of its context it sees. Kernels read the tensors; references on a CPU read
`host`.
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
    `context_lens` [B] int32: tokens of its context that attention sees, and the position of its
    first new K/V. `pages` [S, P] int32: context token i of slot s is in page
    pages[s, i // page_tokens]. `max_seqlen` bounds the lengths of rows that are not padding, and is
    the only number besides shapes that a launch may depend on. `real` [T] bool marks the tokens
    that are not padding, None if there can be no padding. `known` are the same numbers on the host
    where they are at hand.
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
        """Rows from numbers on the host, as tensors on the device of `pages`, in one copy."""
        known = HostRows(tuple(accumulate(lengths, initial=0)), tuple(slots), tuple(context_lens))
        flat = torch.tensor([*known.cu_seqlens, *slots, *context_lens], dtype=torch.int32)
        count = len(lengths)
        cu_seqlens, slot_ids, lens = flat.to(pages.device).split((count + 1, count, count))
        return cls(cu_seqlens, slot_ids, lens, pages, page_tokens, max(lengths), known=known)

    @property
    def count(self) -> int:
        """The number of rows B, padding included."""
        return self.slots.shape[0]

    @cached_property
    def host(self) -> HostRows:
        """The same as numbers: for references. A CUDA graph cannot capture the copy."""
        return self.known or HostRows(
            tuple(self.cu_seqlens.tolist()),
            tuple(self.slots.tolist()),
            tuple(self.context_lens.tolist()),
        )

    def pages_of(self, row: int, tokens: int | None = None) -> list[int]:
        """The pages that hold a row's first `tokens` context tokens; those it sees if None."""
        host = self.host
        count = host.context_lens[row] if tokens is None else tokens
        pages: list[int] = self.pages[host.slots[row], : -(-count // self.page_tokens)].tolist()
        return pages


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
        """The indices of the run's rows."""
        return range(self.row, self.row + self.count)


@dataclass(frozen=True)
class HostRows:
    """The row tensors of `Rows` as Python ints."""

    cu_seqlens: tuple[int, ...]
    slots: tuple[int, ...]
    context_lens: tuple[int, ...]

    @property
    def total(self) -> int:
        """The number of tokens T of the pass, padding included."""
        return self.cu_seqlens[-1]

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """New tokens of each row."""
        return tuple(stop - start for start, stop in pairwise(self.cu_seqlens))

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """Neighbouring rows of one length, padding left out."""
        return tuple(self._runs())

    def slice_of(self, row: int) -> slice:
        """The indices of a row's tokens among the T of the pass."""
        return slice(self.cu_seqlens[row], self.cu_seqlens[row + 1])

    def _runs(self) -> Iterator[Run]:
        kinds = [(length, slot < 0) for length, slot in zip(self.lengths, self.slots, strict=True)]
        row = 0
        for (length, padding), members in groupby(kinds):
            count = len(list(members))
            if not padding:
                yield Run(row, count, self.cu_seqlens[row], length)
            row += count
