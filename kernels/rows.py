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


def page_runs(pages: Sequence[int], page_tokens: int, start: int, stop: int) -> list[slice]:
    """Slices of a pool that hold context tokens start..stop-1, a slice per run of neighbouring
    pages; `pages` are the row's pages in order."""
    runs = []
    while start < stop:
        first = last = start // page_tokens
        while (last + 1) * page_tokens < stop and pages[last + 1] == pages[last] + 1:
            last += 1
        end = min(stop, (last + 1) * page_tokens)
        begin = pages[first] * page_tokens + start % page_tokens
        runs.append(slice(begin, begin + end - start))
        start = end
    return runs


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
        cu_seqlens, slot_ids, lens = flat.to(pages.device).split_with_sizes(
            (count + 1, count, count)
        )
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

    @cached_property
    def host_pages(self) -> tuple[list[int], ...]:
        """The pages of each row's context and new tokens, in order; none of padding."""
        pages = []
        for slot, seen, new in zip(
            self.host.slots, self.host.context_lens, self.host.lengths, strict=True
        ):
            count = -(-(seen + new) // self.page_tokens) if slot >= 0 else 0
            pages.append(self.pages[slot, :count].tolist())
        return tuple(pages)

    def runs_of(self, row: int, start: int, stop: int) -> list[slice]:
        """Slices of the pool that hold a row's context tokens start..stop-1."""
        key = row, start, stop
        known = self._known_runs.get(key)
        if known is None:
            known = page_runs(self.host_pages[row], self.page_tokens, start, stop)
            self._known_runs[key] = known
        return known

    @cached_property
    def real_tokens(self) -> Tensor | None:
        """The indices of tokens that are not padding, int64; None if all are real."""
        slots = self.host.slots
        if min(slots) >= 0:
            return None
        spans = [self.host.slice_of(row) for row, slot in enumerate(slots) if slot >= 0]
        tokens = [token for span in spans for token in range(span.start, span.stop)]
        return torch.tensor(tokens, dtype=torch.int64, device=self.pages.device)

    @cached_property
    def new_places(self) -> Tensor:
        """The pool tokens that the K/V of the real new tokens go to, int64."""
        host, places = self.host, list[int]()
        for row, slot in enumerate(host.slots):
            start = host.context_lens[row]
            runs = self.runs_of(row, start, start + host.lengths[row]) if slot >= 0 else []
            places += [token for run in runs for token in range(run.start, run.stop)]
        return torch.tensor(places, dtype=torch.int64, device=self.pages.device)

    @cached_property
    def _known_runs(self) -> dict[tuple[int, int, int], list[slice]]:
        return {}


@dataclass(frozen=True)
class Run:
    """`count` neighbouring rows of `length` tokens each, from row `row`, token `token` on."""

    row: int
    count: int
    token: int
    length: int

    def take(self, packed: Tensor) -> Tensor:
        """packed [T, ...] -> this run's part as [count, length, ...], a view."""
        stop = self.token + self.count * self.length
        part = packed if stop - self.token == packed.shape[0] else packed[self.token : stop]
        return part.view(self.count, self.length, *part.shape[1:])

    @property
    def rows(self) -> range:
        """The indices of the run's rows."""
        return range(self.row, self.row + self.count)

    def singles(self) -> Iterator[Run]:
        """The run's rows as runs of one row."""
        for index in range(self.count):
            yield Run(self.row + index, 1, self.token + index * self.length, self.length)


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
