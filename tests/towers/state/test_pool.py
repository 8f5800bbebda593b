"""Slots and pages of a pool, and how large a pool a budget gives."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.random_model import SMALL
from twotower.towers.errors import CapacityError, ConfigError
from twotower.towers.state import budget as memory
from twotower.towers.state.budget import affordable_pages, free_bytes, pool_for
from twotower.towers.state.context_state import rows_of
from twotower.towers.state.pages import PAGE_TOKENS, PageAllocator, SlotAllocator, pages_for
from twotower.towers.state.pool import StatePool
from twotower.towers.state.tensors import page_bytes, slot_bytes

CPU = torch.device("cpu")
SLOT_BYTES = 4 * (3 * 32 + 4 * 4 * 4)
PAGE_BYTES = 4 * 2 * 2 * 4 * 64


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (64, 1), (65, 2), (128, 2)])
def test_pages_for_tokens(tokens: int, pages: int) -> None:
    assert PAGE_TOKENS == 64
    assert pages_for(tokens) == pages


def test_pages_are_neighbours_where_there_is_room() -> None:
    pages = PageAllocator(10)
    first, second, third = pages.allocate(2), pages.allocate(3), pages.allocate(2)
    assert (first, second, third) == ([0, 1], [2, 3, 4], [5, 6])
    pages.free(first)
    assert pages.allocate(3) == [7, 8, 9]
    pages.free(second)
    # Pages 0..4 are one run again.
    assert pages.allocate(4) == [0, 1, 2, 3]
    assert pages.num_free == 1


def test_scattered_pages_are_taken_where_no_run_is_long_enough() -> None:
    pages = PageAllocator(6)
    rows = [pages.allocate(1) for _ in range(6)]
    for row in (rows[1], rows[4], rows[3]):
        pages.free(row)
    assert pages.allocate(3) == [1, 3, 4]
    with pytest.raises(CapacityError, match="pages: got a need of 1, expected at most 0"):
        pages.allocate(1)


def test_a_shared_page_returns_with_its_last_holder() -> None:
    pages = PageAllocator(4)
    row = pages.allocate(3)
    pages.share(row[:2])
    assert [pages.holders(page) for page in range(4)] == [2, 2, 1, 0]
    pages.free(row)
    assert pages.num_free == 2
    pages.free(row[:2])
    assert pages.num_free == 4


@pytest.mark.parametrize("wrong", [[3], [0, 3], [0, 0], [-1], [99]])
def test_a_page_that_is_not_held_is_neither_freed_nor_shared(wrong: list[int]) -> None:
    pages = PageAllocator(4)
    pages.allocate(2)
    for call in (pages.free, pages.share):
        with pytest.raises(ValueError, match=r"^pages: got "):
            call(wrong)
        assert pages.num_free == 2
        assert [pages.holders(page) for page in range(4)] == [1, 1, 0, 0]


@pytest.mark.parametrize("seed", range(5))
def test_pages_always_add_up(seed: int) -> None:
    """Against a plain count of holders per page."""
    draw, pages = random.Random(seed), PageAllocator(40)
    holds: list[list[int]] = []
    for _ in range(600):
        kind = draw.choice(["allocate", "share", "free"])
        count = draw.randint(0, 12)
        if kind == "allocate" and count <= pages.num_free:
            free = {page for page in range(40) if not pages.holders(page)}
            got = pages.allocate(count)
            assert set(got) <= free
            assert len(got) == len(set(got)) == count
            starts = [page for page in free if set(range(page, page + count)) <= free]
            if starts and count:
                assert got == list(range(min(starts), min(starts) + count))
            holds.append(got)
        elif kind == "share" and holds:
            own = draw.choice(holds)
            own = draw.sample(own, draw.randint(0, len(own)))
            pages.share(own)
            holds.append(own)
        elif kind == "free" and holds:
            pages.free(holds.pop(draw.randrange(len(holds))))
        held = Counter(page for own in holds for page in own)
        assert [pages.holders(page) for page in range(40)] == [held[page] for page in range(40)]
        assert pages.num_free == 40 - len(held)
    for own in holds:
        pages.free(own)
    assert pages.num_free == 40
    assert pages.allocate(40) == list(range(40))


def test_slots_are_given_from_the_lowest() -> None:
    slots = SlotAllocator(3)
    assert [slots.allocate() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(CapacityError, match="slots: all 3 are in use"):
        slots.allocate()
    slots.free(2)
    slots.free(0)
    assert slots.num_free == 2
    assert slots.allocate() == 0
    for wrong in (2, -1, 3):
        with pytest.raises(ValueError, match=f"slot: got {wrong}, "):
            slots.free(wrong)
    assert slots.num_free == 1


def test_the_tensors_of_a_pool() -> None:
    pool = StatePool(SMALL, 3, 5, CPU, torch.bfloat16)
    assert pool.conv.shape == (3, 1, 3, 32)
    assert pool.ssm.shape == (3, 1, 4, 4, 4)
    assert pool.k.shape == pool.v.shape == (1, 2, 5 * 64, 4)
    assert pool.ssm.dtype == torch.float32
    assert pool.conv.dtype == pool.k.dtype == pool.v.dtype == torch.bfloat16
    held = sum(tensor.nbytes for tensor in (pool.conv, pool.ssm, pool.k, pool.v))
    assert pool.num_bytes == held == 3 * pool.slot_bytes + 5 * pool.page_bytes
    assert pool.slot_bytes == slot_bytes(SMALL, torch.bfloat16)
    assert pool.page_bytes == page_bytes(SMALL, torch.bfloat16)


def test_rows_of_a_pool() -> None:
    pool = StatePool(SMALL, 2, 4, CPU, torch.float32)
    assert pool.could_ever_hold(256)
    assert not pool.could_ever_hold(257)
    first = pool.open(130)
    assert first.pages == [0, 1, 2]
    assert pool.room_for(64)
    assert not pool.room_for(65)
    with pytest.raises(CapacityError, match="got 65 tokens = 2 pages, expected at most the 1 free"):
        pool.open(65)
    second = pool.open(1)
    assert not pool.room_for(0)
    assert (pool.slots_used, pool.pages_used) == (2, 4)
    assert pool.state_bytes == pool.num_bytes == 2 * SLOT_BYTES + 4 * PAGE_BYTES
    pool.close(first)
    pool.close(first)
    first.release()
    assert pool.pages_used == 1
    second.release()
    assert pool.state_bytes == pool.slots_used == 0


def test_the_page_table_says_where_each_slots_tokens_are() -> None:
    """Token i of a slot stands in page table[slot, i // 64], also after pages have changed."""
    pool = StatePool(SMALL, 3, 9, CPU, torch.float32)
    assert pool.page_table.shape == (3, 9)
    assert pool.page_table.dtype == torch.int32
    first, second = pool.open(130), pool.open(64)
    assert pool.page_table[first.slot, :3].tolist() == first.pages == [0, 1, 2]
    pool.close(first)
    third, fourth = pool.open(64 * 4), pool.open(64 * 2)
    for state in (second, third, fourth):
        assert pool.page_table[state.slot, : len(state.pages)].tolist() == state.pages
    fourth.restore(torch.ones(1, 3, 32), torch.ones(1, 4, 4, 4), second.pages, 64)
    assert fourth.pages[0] == second.pages[0]
    assert pool.page_table[fourth.slot, :2].tolist() == fourth.pages


@pytest.mark.parametrize(("pages", "width"), [(0, 1), (5, 5), (64, 64), (200, 64)])
def test_the_page_table_is_as_wide_as_a_row_may_be_long(pages: int, width: int) -> None:
    """4096 tokens are 64 pages."""
    assert StatePool(SMALL, 2, pages, CPU, torch.float32).page_table.shape == (2, width)


def test_the_rows_of_a_pass_are_told_by_their_states() -> None:
    pool = StatePool(SMALL, 3, 9, CPU, torch.float32)
    states = [pool.open(130), pool.open(64)]
    rows = rows_of(states[::-1], [2, 5], [7, 100])
    assert rows.host.slots == (1, 0)
    assert rows.host.context_lens == (7, 100)
    assert rows.host.cu_seqlens == (0, 2, 7)
    assert rows.pages is pool.page_table
    assert rows.page_tokens == PAGE_TOKENS
    assert rows.host_pages == ([3], [0, 1])
    other = StatePool(SMALL, 1, 1, CPU, torch.float32)
    with pytest.raises(AssertionError, match="states of one pass share a pool"):
        rows_of([states[0], other.open(1)], [1, 1], [0, 0])


def test_a_layers_kv_is_a_view_of_the_pool() -> None:
    config = replace(SMALL, layer_pattern="*M*")
    pool = StatePool(config, 1, 2, CPU, torch.float32)
    for layer in range(2):
        context = pool.layer_kv(layer)
        context.k.fill_(1.0 + layer)
        context.v.fill_(3.0 + layer)
    assert [pool.k[layer].unique().tolist() for layer in range(2)] == [[1.0], [2.0]]
    assert [pool.v[layer].unique().tolist() for layer in range(2)] == [[3.0], [4.0]]


def test_a_failed_open_takes_nothing() -> None:
    pool = StatePool(SMALL, 1, 4, CPU, torch.float32)
    row = pool.open(64)
    with pytest.raises(CapacityError):
        pool.open(64)
    assert pool.pages.num_free == 3
    row.release()
    with pytest.raises(CapacityError):
        pool.open(257)
    assert pool.slots.num_free == 1


def test_a_slot_is_clean_for_the_next_row() -> None:
    pool = StatePool(SMALL, 1, 1, CPU, torch.float32)
    for held in (pool.conv, pool.ssm, pool.k, pool.v):
        held.fill_(float("nan"))
    state = pool.open(64)
    assert not state.conv.any()
    assert not state.ssm.any()


@pytest.mark.parametrize(
    ("rows", "context", "spare", "pages"),
    [
        # All that is wanted, or what is left after the slots, in whole pages.
        (4, 130, 1 << 40, 12),
        (4, None, 1 << 40, 256),
        (4, 130, 12 * PAGE_BYTES, 12),
        (4, 130, 12 * PAGE_BYTES - 1, 11),
        (4, 130, 3 * PAGE_BYTES, 3),
        (1, 1, PAGE_BYTES, 1),
    ],
)
def test_pages_within_a_budget(rows: int, context: int | None, spare: int, pages: int) -> None:
    limit = rows * SLOT_BYTES + spare
    assert affordable_pages(SMALL, rows, context, limit, torch.float32) == pages


def test_a_budget_below_one_row_is_refused_with_the_arithmetic() -> None:
    slots, row = 4 * SLOT_BYTES, 3 * PAGE_BYTES
    limit = slots + row - 1
    with pytest.raises(ConfigError) as caught:
        affordable_pages(SMALL, 4, 130, limit, torch.float32)
    text = str(caught.value)
    for part in (f"got {limit} ", f"at least {slots + row}: {slots} ", f"{row} for the 3 pages"):
        assert part in text
    assert "max_num_seqs = 4" in text
    assert "max_context = 130" in text


def test_a_model_without_attention_needs_no_page_bytes() -> None:
    config = replace(SMALL, layer_pattern="M-")
    limit = 2 * slot_bytes(config, torch.float32)
    assert affordable_pages(config, 2, 100, limit, torch.float32) == 4
    assert StatePool(config, 2, 4, CPU, torch.float32).num_bytes == limit


def test_a_pool_takes_its_share_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    free = 8 * SLOT_BYTES + 40 * PAGE_BYTES
    monkeypatch.setattr(memory, "free_bytes", lambda _: free)
    asked = {"max_num_seqs": 2, "max_context": 640}
    pool = pool_for(SMALL, CPU, torch.float32, **asked, memory_fraction=0.5)
    assert pool.slots.num_slots == 2
    assert pool.num_bytes <= 0.5 * free < pool.num_bytes + PAGE_BYTES


def test_free_memory_is_that_of_the_machine_or_its_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = next(int(line.split()[1]) for line in lines if line.startswith("MemTotal:")) * 1024
    assert 0 < free_bytes(CPU) <= total
    monkeypatch.setattr(memory, "group_bytes", lambda: 1234)
    assert free_bytes(CPU) == 1234


def test_a_large_pool_costs_nothing_until_it_is_used() -> None:
    before = resident_bytes()
    pool = StatePool(SMALL, 64, 60_000, CPU, torch.float32)
    assert pool.num_bytes > 200 << 20
    pool.open(4096)
    assert resident_bytes() - before < 20 << 20


def resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) * 1024
