# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Sorts (token, slot) pairs by expert and cuts them into tiles, on the device.

A pair is a token and one of its k slots, token * k + slot. The programs that multiply walk a table
of tiles whose length is on the device too, so that nothing is read back and a launch depends on
shapes alone. Tokens are taken in blocks: from how often each block chooses each expert follows
where a block's pairs go, so that no program reads another block's ids. The order is stable.
Source: Gale et al. 2022 (MegaBlocks), section 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower.kernels.overlap_triton import overlap, wait

# Tokens of a block.
BLOCK = 64
# Pairs that are placed at a time by programs of one warp and of four.
PAIRS_OF_ONE_WARP = 32
_PAIRS_OF_FOUR = 64
# Blocks whose counts are read at a time.
_BLOCKS_AT_ONCE = 16


@dataclass(frozen=True)
class Tiles:
    """Sorted pairs and the tiles of at most `rows` pairs into which they are cut.

    `pairs` [T * k] int32, sorted by expert; pairs without an expert are left out, and the end is
    not written. `table` [1 + 3 * most] int32: the number of tiles, then for each tile its expert,
    the index of its first sorted pair and its rows. `most` bounds the number of tiles, whatever the
    ids.
    """

    pairs: Tensor
    table: Tensor
    most: int
    rows: int

    @classmethod
    def empty(cls, count: int, experts: int, rows: int, device: torch.device) -> Tiles:
        """Room for `count` pairs of so many experts; nothing is written yet."""
        # Every expert in use has at most one tile that is not full.
        used = min(experts, count)
        most = used + (count - used) // rows
        pairs = torch.empty(count, dtype=torch.int32, device=device)
        table = torch.empty(1 + 3 * most, dtype=torch.int32, device=device)
        return cls(pairs, table, most, rows)


def sort_by_expert(ids: Tensor, experts: int, rows: int) -> Tiles:
    """ids [T, k] int64 of 0..experts-1 or -1 for none -> tiles of at most `rows` pairs."""
    ids = ids.contiguous()
    tokens, top_k = ids.shape
    tiles = Tiles.empty(tokens * top_k, experts, rows, ids.device)
    blocks = triton.cdiv(tokens, BLOCK)
    counts = torch.empty(blocks, experts, dtype=torch.int32, device=ids.device)
    _count_kernel[(blocks,)](
        ids,
        counts,
        tokens * top_k,
        experts=experts,
        expert_lanes=triton.next_power_of_2(experts),
        block_pairs=BLOCK * top_k,
        pair_lanes=triton.next_power_of_2(BLOCK * top_k),
        num_warps=4,
        **overlap(ids.device),
    )
    place(ids, counts, tiles)
    return tiles


def place(ids: Tensor, counts: Tensor, tiles: Tiles) -> None:
    """Writes `tiles` from ids [T, k] and `counts` [blocks, E] int32: how many pairs of each block
    of BLOCK tokens chose each expert."""
    assert ids.is_contiguous()
    assert counts.is_contiguous()
    blocks, experts = counts.shape
    tokens, top_k = ids.shape
    _place_kernel[(blocks,)](
        ids,
        counts,
        tiles.pairs,
        tiles.table,
        tokens * top_k,
        blocks,
        experts=experts,
        expert_lanes=triton.next_power_of_2(experts),
        block_pairs=BLOCK * top_k,
        tile_rows=tiles.rows,
        at_once=_PAIRS_OF_FOUR,
        block_lanes=_BLOCKS_AT_ONCE,
        num_warps=4,
        **overlap(ids.device),
    )


@triton.jit
def _count_kernel(
    ids,
    counts,
    count,
    experts: tl.constexpr,
    expert_lanes: tl.constexpr,
    block_pairs: tl.constexpr,
    pair_lanes: tl.constexpr,
    waits: tl.constexpr,
):
    """A program per block of tokens."""
    wait(waits)
    lane = tl.arange(0, pair_lanes)
    pair = tl.program_id(0) * block_pairs + lane
    inside = (lane < block_pairs) & (pair < count)
    chosen = tl.load(ids + pair, mask=inside, other=-1).to(tl.int32)
    found = tl.histogram(chosen, expert_lanes, mask=(chosen >= 0) & (chosen < experts))
    expert = tl.arange(0, expert_lanes)
    tl.store(counts + tl.program_id(0) * experts + expert, found, mask=expert < experts)


@triton.jit
def place_block(
    ids,
    counts,
    pairs,
    table,
    block,
    count,
    blocks,
    experts: tl.constexpr,
    expert_lanes: tl.constexpr,
    block_pairs: tl.constexpr,
    tile_rows: tl.constexpr,
    at_once: tl.constexpr,
    block_lanes: tl.constexpr,
):
    """Writes the sorted pairs of a block of tokens, and the tiles of every `blocks`-th expert.

    Ids and counts may have been written by other programs of this launch: they are read past the
    multiprocessor's own cache.
    """
    expert = tl.arange(0, expert_lanes)
    total = tl.zeros([expert_lanes], tl.int32)
    before = tl.zeros([expert_lanes], tl.int32)
    start = 0
    while start < blocks:
        other = start + tl.arange(0, block_lanes)
        known = (other < blocks)[:, None] & (expert < experts)[None, :]
        source = counts + other[:, None] * experts + expert[None, :]
        each = tl.load(source, mask=known, other=0, cache_modifier=".cg")
        total += tl.sum(each, axis=0)
        before += tl.sum(tl.where((other < block)[:, None], each, 0), axis=0)
        start += block_lanes
    first_pair = tl.cumsum(total, axis=0) - total

    index = tl.arange(0, at_once)
    target = first_pair + before
    last = tl.minimum(block_pairs, count - block * block_pairs)
    start = 0
    while start < last:
        pair = block * block_pairs + start + index
        inside = start + index < last
        chosen = tl.load(ids + pair, mask=inside, other=-1, cache_modifier=".cg").to(tl.int32)
        real = (chosen >= 0) & (chosen < experts)
        earlier = (index[None, :] < index[:, None]) & (chosen[None, :] == chosen[:, None])
        rank = tl.sum(earlier.to(tl.int32), axis=1)
        position = tl.gather(target, tl.where(real, chosen, 0), axis=0) + rank
        tl.store(pairs + position, pair, mask=real)
        target += tl.histogram(chosen, expert_lanes, mask=real)
        start += at_once

    tiles = (total + tile_rows - 1) // tile_rows
    first_tile = tl.cumsum(tiles, axis=0) - tiles
    if block == 0:
        tl.store(table, tl.sum(tiles, axis=0))
    own = tl.where(expert % blocks == block, tiles, 0)
    most = tl.max(own, axis=0)
    tile = 0
    while tile < most:
        entry = table + 1 + 3 * (first_tile + tile)
        within = tile < own
        tl.store(entry, expert, mask=within)
        tl.store(entry + 1, first_pair + tile * tile_rows, mask=within)
        tl.store(entry + 2, tl.minimum(total - tile * tile_rows, tile_rows), mask=within)
        tile += 1


@triton.jit
def _place_kernel(
    ids,
    counts,
    pairs,
    table,
    count,
    blocks,
    experts: tl.constexpr,
    expert_lanes: tl.constexpr,
    block_pairs: tl.constexpr,
    tile_rows: tl.constexpr,
    at_once: tl.constexpr,
    block_lanes: tl.constexpr,
    waits: tl.constexpr,
):
    """A program per block of tokens."""
    wait(waits)
    place_block(
        ids,
        counts,
        pairs,
        table,
        tl.program_id(0),
        count,
        blocks,
        experts,
        expert_lanes,
        block_pairs,
        tile_rows,
        at_once,
        block_lanes,
    )
