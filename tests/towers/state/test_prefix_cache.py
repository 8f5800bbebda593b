"""Entries for rows that begin alike: budget, order of leaving, shared pages, equal bits."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.comparing import assert_same_bits, normal
from tests.support.random_model import SMALL, small_config, write_checkpoint
from twotower.towers.checkpoint.weights import load_context_tower
from twotower.towers.errors import CapacityError
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.state.context_state import ContextState
from twotower.towers.state.pass_log import PassLog
from twotower.towers.state.pool import StatePool
from twotower.towers.state.prefix_cache import PrefixCache, chain_keys, next_key

CHUNK = 64
HIDDEN = torch.arange(16.0)
NO_HIDDEN = torch.empty(0)
SNAPSHOT_BYTES = 4 * (3 * 32 + 4 * 4 * 4)
ENTRY_BYTES = SNAPSHOT_BYTES + 4 * 16


def new_pool(slots: int = 8, pages: int = 32) -> StatePool:
    return StatePool(SMALL, slots, pages, torch.device("cpu"), torch.float32)


def row_of(pool: StatePool, tokens: int, capacity: int = 256, seed: int = 1) -> ContextState:
    """A row that stands at some tokens; all that it holds depends on the seed."""
    state = pool.open(capacity)
    write(state, tokens, seed)
    return state


def write(state: ContextState, tokens: int, seed: int) -> None:
    """Moves a row on by some tokens: K/V behind what is there, and another snapshot."""
    state.write_kv(0, normal(2, tokens, 4, seed=seed), normal(2, tokens, 4, seed=seed + 1))
    state.append(PassLog(normal(1, tokens, 32), normal(1, tokens, 4)), tokens)
    state.position += tokens
    state.truncate()
    state.conv.copy_(normal(1, 3, 32, seed=seed + 2))
    state.ssm.copy_(normal(1, 4, 4, 4, seed=seed + 3))


def contents(state: ContextState) -> list[Tensor]:
    parts = (state.conv, state.ssm, *state.kv(0, 0, state.position))
    return [part.clone() for part in parts]


def assert_same_contents(state: ContextState, want: Sequence[Tensor]) -> None:
    for got, own in zip(contents(state), want, strict=True):
        assert_same_bits(got, own)


def test_a_key_fixes_tokens_and_borders() -> None:
    pieces = [[1, 2, 3], [4, 5], [6]]
    keys = chain_keys(pieces)
    assert len(set(keys)) == 3
    assert keys == chain_keys([list(piece) for piece in pieces])
    assert chain_keys(pieces[:2]) == keys[:2]
    assert keys[2] == next_key(keys[1], [6])
    others = [
        [[1, 2, 3], [4], [5, 6]],
        [[1, 2], [3, 4, 5], [6]],
        [[1, 2, 3, 4, 5, 6]],
        [[1, 2, 3], [4, 5], [7]],
        [[2, 1, 3], [4, 5], [6]],
        [[1, 2, 3], [4, 5], [6], []],
        [[], [1, 2, 3], [4, 5], [6]],
    ]
    ends = {chain_keys(own)[-1] for own in others} | {keys[-1]}
    assert len(ends) == len(others) + 1
    assert chain_keys([]) == []
    # Tokens that spell a key are no key.
    spelled = [*array("q", keys[0]), 4, 5]
    assert next_key(b"", spelled) != keys[1]


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 128, 150])
def test_a_restored_row_holds_what_was_inserted(tokens: int) -> None:
    pool = new_pool()
    cache = PrefixCache(pool, 10 * ENTRY_BYTES)
    row = row_of(pool, tokens)
    want = contents(row)
    cache.insert(b"key", row, HIDDEN)
    # What the row goes on to write is its own.
    write(row, 30, seed=70)
    row.release()
    other = row_of(pool, 200, seed=90)
    restored = pool.open(256)
    hidden = cache.restore(b"key", restored)
    assert hidden is not None
    assert_same_bits(hidden, HIDDEN)
    assert restored.position == restored.length == tokens
    assert_same_contents(restored, want)
    write(restored, 40, seed=80)
    fresh = pool.open(256)
    cache.restore(b"key", fresh)
    assert_same_contents(fresh, want)
    for state in (other, restored, fresh):
        state.release()
    cache.clear()
    assert pool.pages_used == pool.slots_used == 0


def test_full_pages_are_shared_and_the_reserved_ones_returned() -> None:
    pool = new_pool()
    cache = PrefixCache(pool, 10 * ENTRY_BYTES)
    row = row_of(pool, 150)
    cache.insert(b"key", row, NO_HIDDEN)
    # Two full pages are the row's, the third is a copy.
    assert pool.pages_used == 4 + 1
    restored = pool.open(256)
    assert pool.pages_used == 4 + 1 + 4
    assert cache.restore(b"key", restored).numel() == 0
    assert pool.pages_used == 4 + 1 + 2
    assert restored.pages[:2] == row.pages[:2]
    assert not set(restored.pages[2:]) & set(row.pages)
    assert len(restored.pages) == 4


def test_release_and_eviction_free_only_their_own_hold() -> None:
    pool = new_pool()
    cache = PrefixCache(pool, 10 * ENTRY_BYTES)
    row = row_of(pool, 128)
    want = contents(row)
    cache.insert(b"key", row, NO_HIDDEN)
    row.release()
    assert pool.pages_used == 2
    restored = pool.open(192)
    cache.restore(b"key", restored)
    cache.clear()
    assert pool.pages_used == 3
    taker = row_of(pool, 64 * 28, capacity=64 * 29, seed=50)
    assert_same_contents(restored, want)
    taker.release()
    restored.release()
    assert pool.pages_used == 0


def test_the_longest_prefix_is_found() -> None:
    pool = new_pool()
    cache = PrefixCache(pool, 10 * ENTRY_BYTES)
    row = row_of(pool, 64)
    keys = chain_keys([[1], [2], [3], [4]])
    assert cache.longest(keys) == -1
    assert cache.longest([]) == -1
    cache.insert(keys[0], row, NO_HIDDEN)
    cache.insert(keys[2], row, NO_HIDDEN)
    assert [cache.longest(keys[:count]) for count in range(1, 5)] == [0, 0, 2, 2]
    cache.restore(keys[2], pool.open(64))
    assert (cache.num_entries, cache.num_bytes) == (2, 2 * SNAPSHOT_BYTES)
    assert (cache.hits, cache.misses, cache.cached_tokens) == (1, 2, 64)


def test_those_not_used_for_the_longest_time_leave_first() -> None:
    pool = new_pool()
    cache = PrefixCache(pool, 3 * ENTRY_BYTES)
    row = row_of(pool, 64)
    for key in (b"a", b"b", b"c"):
        cache.insert(key, row, HIDDEN)
    cache.restore(b"a", pool.open(64))
    cache.insert(b"b", row, HIDDEN)
    cache.insert(b"d", row, HIDDEN)
    assert [cache.longest([key]) for key in (b"a", b"b", b"c", b"d")] == [0, 0, -1, 0]
    cache.insert(b"e", row, HIDDEN)
    assert [cache.longest([key]) for key in (b"a", b"b", b"d", b"e")] == [-1, 0, 0, 0]
    assert cache.num_bytes == 3 * ENTRY_BYTES


def test_an_entry_above_the_budget_is_not_kept_and_drives_none_out() -> None:
    pool = new_pool()
    cache = PrefixCache(pool, SNAPSHOT_BYTES)
    row = row_of(pool, 70)
    cache.insert(b"a", row, NO_HIDDEN)
    used = pool.pages_used
    cache.insert(b"b", row, HIDDEN)
    assert cache.longest([b"b"]) == -1
    assert cache.longest([b"a"]) == 0
    assert pool.pages_used == used


def test_without_a_page_for_the_last_tokens_nothing_is_kept() -> None:
    pool = new_pool(pages=4)
    cache = PrefixCache(pool, 10 * ENTRY_BYTES)
    row = row_of(pool, 128)
    cache.insert(b"whole pages need none", row, NO_HIDDEN)
    write(row, 5, seed=9)
    cache.insert(b"key", row, NO_HIDDEN)
    assert cache.num_entries == 1
    assert pool.pages_used == 4


def test_restoring_what_does_not_fit_changes_nothing() -> None:
    pool = new_pool()
    cache = PrefixCache(pool, 10 * ENTRY_BYTES)
    cache.insert(b"key", row_of(pool, 130), NO_HIDDEN)
    small, begun = pool.open(129), row_of(pool, 3, seed=20)
    before = pool.slots_used, pool.pages_used
    for state in (small, begun):
        with pytest.raises(ValueError, match="position: got 130, expected at most the capacity"):
            cache.restore(b"key", state)
    with pytest.raises(ValueError, match=r"^key: got "):
        cache.restore(b"other", small)
    assert (pool.slots_used, pool.pages_used) == before
    assert small.position == 0
    assert cache.hits == 0


def test_pages_are_reclaimed_from_the_least_recently_used() -> None:
    pool = new_pool(pages=8)
    cache = PrefixCache(pool, 10 * ENTRY_BYTES)
    for number, key in enumerate((b"a", b"b", b"c")):
        row = row_of(pool, 128, capacity=128, seed=10 * number)
        cache.insert(key, row, NO_HIDDEN)
        row.release()
    reader = pool.open(128)
    cache.restore(b"a", reader)
    assert pool.pages.num_free == 2
    # Of a's pages none comes free: a row reads them. b's and c's are four.
    assert not cache.reclaim(5)
    assert cache.num_entries == 3
    assert cache.reclaim(1)
    assert pool.pages.num_free == 4
    assert [cache.longest([key]) for key in (b"a", b"b", b"c")] == [0, -1, 0]
    assert cache.reclaim(2)
    assert pool.pages.num_free == 6
    assert_same_bits(reader.kv(0, 0, 128)[0], normal(2, 128, 4, seed=0))


def test_reclaim_counts_pages_that_several_entries_hold() -> None:
    pool = new_pool(pages=4)
    cache = PrefixCache(pool, 10 * ENTRY_BYTES)
    row = row_of(pool, 64, capacity=128)
    cache.insert(b"a", row, NO_HIDDEN)
    write(row, 64, seed=30)
    cache.insert(b"b", row, NO_HIDDEN)
    row.release()
    assert cache.reclaim(2)
    assert cache.num_entries == 0
    assert pool.pages.num_free == 4


@dataclass
class Live:
    """A row and what it must hold."""

    state: ContextState
    want: list[Tensor]


@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_events_keeps_counts_and_contents(seed: int) -> None:
    draw = random.Random(seed)
    pool = new_pool(slots=6, pages=24)
    cache = PrefixCache(pool, 5 * ENTRY_BYTES)
    rows: list[Live] = []
    kept: dict[bytes, list[Tensor]] = {}
    for step in range(400):
        event = draw.choice(["open", "write", "write", "insert", "restore", "release", "reclaim"])
        if event == "open":
            try:
                state = pool.open(draw.randint(1, 400))
            except CapacityError:
                continue
            rows.append(Live(state, contents(state)))
        elif event == "reclaim":
            before, count = pool.pages.num_free, draw.randint(1, 6)
            assert cache.reclaim(count) == (pool.pages.num_free >= before + count)
        elif rows:
            act(event, draw, rows, cache, kept, step)
        check(pool, cache, rows)
    for live in rows:
        live.state.release()
    cache.clear()
    assert pool.pages_used == pool.slots_used == 0
    assert cache.hits > 0
    assert cache.num_bytes == 0


def act(
    event: str,
    draw: random.Random,
    rows: list[Live],
    cache: PrefixCache,
    kept: dict[bytes, list[Tensor]],
    step: int,
) -> None:
    """One event of one row."""
    live = draw.choice(rows)
    state = live.state
    if event == "write" and state.position < state.capacity:
        write(state, draw.randint(1, min(90, state.capacity - state.position)), seed=10 * step)
        live.want = contents(state)
    elif event == "insert" and state.position:
        key = step.to_bytes(4, "little")
        cache.insert(key, state, NO_HIDDEN)
        kept[key] = live.want
    elif event == "restore" and not state.position:
        there = [key for key in kept if cache.longest([key]) == 0]
        key = draw.choice(there) if there else b""
        if there and kept[key][2].shape[1] <= state.capacity:
            cache.restore(key, state)
            live.want = kept[key]
    elif event == "release":
        state.release()
        rows.remove(live)


def check(pool: StatePool, cache: PrefixCache, rows: list[Live]) -> None:
    """Nobody's contents changed; pages in use are those that somebody holds, no more."""
    for live in rows:
        assert_same_contents(live.state, live.want)
    held = {page for live in rows for page in live.state.pages}
    held |= {page for entry in cache._entries.values() for page in entry.pages}
    assert pool.pages_used == len(held)
    assert pool.slots_used == len(rows)
    assert cache.num_bytes == cache.num_entries * SNAPSHOT_BYTES <= cache.max_bytes


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> ContextTower:
    """Two Mamba and two attention layers."""
    folder: Path = tmp_path_factory.mktemp("model")
    return load_context_tower(write_checkpoint(folder, small_config(layer_pattern="M*E-M*")))


def read(tower: ContextTower, state: ContextState, pieces: Sequence[Sequence[int]]) -> Tensor:
    """Reads pieces, a pass each; the last hidden state."""
    for piece in pieces:
        hidden = tower.forward([piece], [state])
        tower.advance(state, len(piece))
    return hidden[-1]


@pytest.mark.parametrize("length", [1, 40, 64, 100, 128, 150])
@pytest.mark.parametrize("cut", ["first piece", "last piece"])
def test_a_row_goes_on_from_an_entry_with_the_bits_of_one_read_by_passes(
    tower: ContextTower, length: int, cut: str
) -> None:
    draw = random.Random(length)
    tokens = [draw.randrange(4, 24) for _ in range(length)]
    pieces = [tokens[i : i + CHUNK] for i in range(0, length, CHUNK)]
    saved = 1 if cut == "first piece" else len(pieces)
    pool = StatePool(tower.config, 4, 24, tower.device, tower.dtype)
    cache = PrefixCache(pool, 1 << 20)
    keys, writer = chain_keys(pieces), pool.open(300)
    for piece, key in zip(pieces, keys, strict=True):
        last = read(tower, writer, [piece])
        if key == keys[saved - 1]:
            cache.insert(key, writer, last)
    # The first row goes another way and ends; its pages are written over.
    read(tower, writer, [[5] * 60])
    writer.release()
    read(tower, pool.open(300), [[7] * 120])
    restored, plain = pool.open(300), pool.open(300)
    hidden = cache.restore(keys[saved - 1], restored)
    want = read(tower, plain, pieces[:saved])
    assert hidden is not None
    assert_same_bits(hidden, want)
    follow = [*pieces[saved:], [9, 8, 7], [6], [5] * 16]
    assert_same_bits(read(tower, restored, follow), read(tower, plain, follow))
    assert_same_bits(restored.ssm, plain.ssm)
    assert_same_bits(restored.conv, plain.conv)
    for layer in range(2):
        for got, own in zip(
            restored.kv(layer, 0, restored.length), plain.kv(layer, 0, plain.length), strict=True
        ):
            assert_same_bits(got, own)
