"""The memory of all rows' context states: Mamba states in slots, K/V in pages, taken once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from twotower.kernels.attention import PagedKeyValues
from twotower.kernels.rows import page_runs
from twotower.towers.config.model_config import ATTENTION, MAMBA, TwoTowerConfig
from twotower.towers.state.pages import PAGE_TOKENS, PageAllocator, SlotAllocator, pages_for


class StateTensors:
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

    @property
    def most_pages(self) -> int:
        """Most pages of a row: those of the pool, or of the model's context if that is less."""
        return self.page_table.shape[1]

    def runs(self, pages: Sequence[int], start: int, stop: int) -> list[slice]:
        """Slices of `k` and `v` that hold tokens start..stop-1 of a row with these pages."""
        return page_runs(pages, PAGE_TOKENS, start, stop)

    def layer_kv(self, layer: int) -> PagedKeyValues:
        """An attention layer's K/V of all rows, for the attention operators."""
        return PagedKeyValues(self.k[layer], self.v[layer])

    def write_pages(self, slot: int, pages: Sequence[int]) -> None:
        """Enters a row's pages into the table that the attention operators read."""
        entries = torch.tensor(pages, dtype=torch.int32)
        self.page_table[slot, : len(pages)] = entries.to(self.page_table.device)

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
