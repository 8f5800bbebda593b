"""Memory for rows' context states: Mamba states in slots, K/V in pages, all of it taken once.

A row holds one slot and the pages of its whole capacity from the start, so that a row that was let
in never runs out of room. Pages are counted by those who hold them: a row and the prefix cache may
share one.
"""

from __future__ import annotations

import heapq
import os
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from twotower.kernels.attention import PagedKeyValues, page_runs
from twotower.kernels.rows import Rows
from twotower.towers.config import ATTENTION, MAMBA, TwoTowerConfig
from twotower.towers.errors import CapacityError, ConfigError
from twotower.towers.limits import group_bytes
from twotower.towers.state import ContextState

PAGE_TOKENS = 64
# What passes need on a GPU is reserved before; on a CPU, they and other programs need the rest.
_CUDA_FRACTION, _CPU_FRACTION = 0.95, 0.25


def pages_for(tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // PAGE_TOKENS)


class PageAllocator:
    """Which of `num_pages` pages are free, and how many holders each of the others has."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_free = num_pages
        self._holders: dict[int, int] = {}
        # Free pages as runs start..stop-1, in order and never touching each other.
        self._runs: list[tuple[int, int]] = [(0, num_pages)] if num_pages else []

    def allocate(self, count: int) -> list[int]:
        """The lowest run of neighbouring pages that is long enough, otherwise the lowest pages.

        Raises CapacityError if fewer pages are free.
        """
        if count > self.num_free:
            raise CapacityError(f"pages: got a need of {count}, expected at most {self.num_free}")
        fitting = [run for run in self._runs if run[1] - run[0] >= count][:1]
        pages: list[int] = []
        for run in fitting or list(self._runs):
            pages += self._take(run, count - len(pages))
            if len(pages) == count:
                break
        self.num_free -= count
        self._holders |= dict.fromkeys(pages, 1)
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """One holder more for each page. Raises ValueError for a free page."""
        self._check_held(pages)
        for page in pages:
            self._holders[page] += 1

    def free(self, pages: Sequence[int]) -> None:
        """One holder less for each page; a page without holders is free again.

        Raises ValueError, and changes nothing, for a page that is free or named twice.
        """
        self._check_held(pages)
        for page in pages:
            self._holders[page] -= 1
            if not self._holders[page]:
                del self._holders[page]
                self._give_back(page)

    def holders(self, page: int) -> int:
        """How many hold a page; 0 if it is free."""
        return self._holders.get(page, 0)

    def _take(self, run: tuple[int, int], count: int) -> range:
        start, stop = run
        taken = range(start, min(stop, start + count))
        place = bisect_left(self._runs, run)
        self._runs[place : place + 1] = [(taken.stop, stop)] if taken.stop < stop else []
        return taken

    def _give_back(self, page: int) -> None:
        start, stop = page, page + 1
        place = bisect_left(self._runs, (page, page))
        after = before = place
        if place < len(self._runs) and self._runs[place][0] == stop:
            stop, after = self._runs[place][1], place + 1
        if place and self._runs[place - 1][1] == start:
            start, before = self._runs[place - 1][0], place - 1
        self._runs[before:after] = [(start, stop)]
        self.num_free += 1

    def _check_held(self, pages: Sequence[int]) -> None:
        if len(set(pages)) != len(pages):
            raise ValueError(f"pages: got {list(pages)}, expected each page once")
        for page in pages:
            if page not in self._holders:
                raise ValueError(f"pages: got page {page}, expected one that is held")


class SlotAllocator:
    """Which of `num_slots` slots are free."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots))
        self._used: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self) -> int:
        """The lowest free slot. Raises CapacityError if there is none."""
        if not self._free:
            raise CapacityError(f"slots: all {self.num_slots} are in use")
        slot = heapq.heappop(self._free)
        self._used.add(slot)
        return slot

    def free(self, slot: int) -> None:
        """Raises ValueError for a slot that is free already."""
        if slot not in self._used:
            raise ValueError(f"slot: got {slot}, expected one that is in use")
        self._used.remove(slot)
        heapq.heappush(self._free, slot)


class StatePool:
    """All context states of one tower: S slots, and pages for T = num_pages * PAGE_TOKENS tokens.

    `conv` [S, M, K-1, Cd], `ssm` [S, M, H, P, N] fp32, `k` and `v` [A, nkv, T, hd]. Nothing is
    cleared here: on a CPU, memory that no row has used yet costs nothing. Not for several threads.
    `page_table` [S, P] int32 has each slot's pages in order.
    """

    page_tokens = PAGE_TOKENS

    def __init__(
        self,
        config: TwoTowerConfig,
        num_slots: int,
        num_pages: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.config = config
        self.slots = SlotAllocator(num_slots)
        self.pages = PageAllocator(num_pages)
        mamba, attention = len(config.layers_of(MAMBA)), len(config.layers_of(ATTENTION))
        conv = (num_slots, mamba, config.conv_kernel - 1, config.conv_dim)
        heads, width = config.mamba_num_heads, config.mamba_head_dim
        ssm = (num_slots, mamba, heads, width, config.ssm_state_size)
        kv = (attention, config.num_key_value_heads, num_pages * PAGE_TOKENS, config.head_dim)
        self.conv = torch.empty(conv, device=device, dtype=dtype)
        self.ssm = torch.empty(ssm, device=device, dtype=torch.float32)
        self.k = torch.empty(kv, device=device, dtype=dtype)
        self.v = torch.empty(kv, device=device, dtype=dtype)
        widest = min(num_pages, pages_for(config.max_position_embeddings))
        table = (num_slots, max(1, widest))
        self.page_table = torch.zeros(table, device=device, dtype=torch.int32)

    def open(self, capacity: int) -> ContextState:
        """An empty state with room for `capacity` tokens.

        Raises CapacityError without a slot and the pages for it.
        """
        if not self.room_for(capacity):
            raise CapacityError(
                f"row: got {capacity} tokens = {pages_for(capacity)} pages, expected at most the "
                f"{self.pages.num_free} free pages and a slot of the {self.slots.num_free} free"
            )
        pages = self.pages.allocate(pages_for(capacity))
        return ContextState(self, self.slots.allocate(), pages, capacity)

    def close(self, state: ContextState) -> None:
        """Takes a state's slot and pages back; a second time it does nothing."""
        state.release()

    def room_for(self, capacity: int) -> bool:
        """Whether `open` would succeed."""
        free = min(self.pages.num_free, self.most_pages)
        return self.slots.num_free > 0 and pages_for(capacity) <= free

    def could_ever_hold(self, capacity: int) -> bool:
        """Whether a row of `capacity` tokens fits into the empty pool and the model's context."""
        return self.slots.num_slots > 0 and pages_for(capacity) <= self.most_pages

    @property
    def most_pages(self) -> int:
        """Pages that one row may have: what the pool or the model's context holds."""
        return self.page_table.shape[1]

    def runs(self, pages: Sequence[int], start: int, stop: int) -> list[slice]:
        """Where tokens start..stop-1 of a row with these pages stand in `k` and `v`."""
        return page_runs(pages, PAGE_TOKENS, start, stop)

    def layer_kv(self, layer: int) -> PagedKeyValues:
        """An attention layer's K/V of all rows, for the attention operators."""
        return PagedKeyValues(self.k[layer], self.v[layer])

    def write_pages(self, slot: int, pages: Sequence[int]) -> None:
        """Enters a row's pages into the table that the attention operators read."""
        own = torch.tensor(pages, dtype=torch.int32)
        self.page_table[slot, : len(pages)] = own.to(self.page_table.device)

    def rows(
        self, states: Sequence[ContextState], lengths: Sequence[int], visible: Sequence[int]
    ) -> Rows:
        """What a pass over new tokens of these states tells the operators; all live here."""
        assert all(state.pool is self for state in states), "states of one pass share a pool"
        slots = [state.slot for state in states]
        return Rows.build(lengths, slots, visible, self.page_table, PAGE_TOKENS)

    def copy_page(self, source: int, target: int, count: int) -> None:
        """Copies the K/V of a page's first `count` tokens into another page."""
        from_, to = source * PAGE_TOKENS, target * PAGE_TOKENS
        for held in (self.k, self.v):
            held[:, :, to : to + count] = held[:, :, from_ : from_ + count]

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot."""
        return slot_bytes(self.config, self.conv.dtype)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return page_bytes(self.config, self.k.dtype)

    @property
    def num_bytes(self) -> int:
        """Bytes of all slots and pages, used or not."""
        return sum(held.nbytes for held in self._tensors())

    def stats(self) -> dict[str, float]:
        """Slots and pages, those in use, the bytes of those in use and of all."""
        slots_used = self.slots.num_slots - self.slots.num_free
        pages_used = self.pages.num_pages - self.pages.num_free
        return {
            "slots": self.slots.num_slots,
            "slots_used": slots_used,
            "pages": self.pages.num_pages,
            "pages_used": pages_used,
            "state_bytes": slots_used * self.slot_bytes + pages_used * self.page_bytes,
            "pool_bytes": self.num_bytes,
        }

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.conv, self.ssm, self.k, self.v


def slot_bytes(config: TwoTowerConfig, dtype: torch.dtype) -> int:
    """Bytes of one row's conv histories in `dtype` and SSM states in fp32."""
    conv = (config.conv_kernel - 1) * config.conv_dim * dtype.itemsize
    ssm = config.d_inner * config.ssm_state_size * torch.float32.itemsize
    return len(config.layers_of(MAMBA)) * (conv + ssm)


def page_bytes(config: TwoTowerConfig, dtype: torch.dtype) -> int:
    """Bytes of K and V of PAGE_TOKENS tokens in all attention layers."""
    width = config.num_key_value_heads * config.head_dim * dtype.itemsize
    return 2 * len(config.layers_of(ATTENTION)) * width * PAGE_TOKENS


@dataclass(frozen=True)
class MemoryBudget:
    """How much a tower's states may take: rows at a time, tokens a row (None: what the model
    allows), and a share of the memory that weights and passes leave (None: 0.95 on CUDA, 0.25 on
    a CPU)."""

    max_num_seqs: int = 64
    max_context: int | None = None
    memory_fraction: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_context"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: got {value}, expected at least 1")
        if self.memory_fraction is not None and not 0.0 < self.memory_fraction <= 1.0:
            raise ConfigError(
                f"memory_fraction: got {self.memory_fraction}, expected above 0 and at most 1"
            )


def pool_for(
    config: TwoTowerConfig,
    budget: MemoryBudget,
    device: torch.device,
    dtype: torch.dtype,
    reserved: int = 0,
) -> StatePool:
    """A pool of `max_num_seqs` slots, with pages for as many rows of `max_context` tokens or for
    those that fit into the share of the memory that is free beside `reserved` bytes.

    Raises ConfigError if not one row of `max_context` tokens fits.
    """
    fraction = budget.memory_fraction
    if fraction is None:
        fraction = _CUDA_FRACTION if device.type == "cuda" else _CPU_FRACTION
    free = max(0, free_bytes(device) - reserved)
    num_pages = affordable_pages(config, budget, int(fraction * free), dtype)
    return StatePool(config, budget.max_num_seqs, num_pages, device, dtype)


def affordable_pages(
    config: TwoTowerConfig, budget: MemoryBudget, limit: int, dtype: torch.dtype
) -> int:
    """Pages of a pool of at most `limit` bytes; raises as `pool_for`."""
    rows, context = budget.max_num_seqs, budget.max_context or config.max_position_embeddings
    slots, page = rows * slot_bytes(config, dtype), page_bytes(config, dtype)
    needed = slots + pages_for(context) * page
    if needed > limit:
        raise ConfigError(
            f"memory: got {limit} bytes for states, expected at least {needed}: {slots} for "
            f"max_num_seqs = {rows} slots and {needed - slots} for the {pages_for(context)} pages "
            f"of one row of max_context = {context} tokens"
        )
    wanted = rows * pages_for(context)
    return min(wanted, (limit - slots) // page) if page else wanted


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device; on a CPU what the system and the control group leave."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(_system_bytes(), group_bytes())


def _system_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024
