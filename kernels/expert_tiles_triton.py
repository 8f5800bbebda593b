# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Sorts (token, slot) pairs by expert and cuts them into tiles, on the device.

A pair is a token and one of its k slots, token * k + slot. The programs that multiply walk a table
of tiles whose length is on the device too, so that nothing is read back and a launch depends on
shapes alone. The order is stable and uses no atomics on memory.
Source: Gale et al. 2022 (MegaBlocks), section 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHUNK = 1024
_LEAST_CHUNK = 32


@dataclass(frozen=True)
class Tiles:
    """Sorted pairs and the tiles into which they are cut.

    `pairs` [T * k] int32, sorted by expert; pairs without an expert are left out, and the end is
    not written. `table` [1 + 3 * most] int32: the number of tiles, then for each tile its expert,
    the index of its first sorted pair and its rows. `most` bounds the number of tiles, whatever the
    ids.
    """

    pairs: Tensor
    table: Tensor
    most: int


def sort_by_expert(ids: Tensor, experts: int, rows: int) -> Tiles:
    """ids [T, k] int64 of 0..experts-1 or -1 for none -> tiles of at most `rows` pairs."""
    assert ids.stride(1) == 1
    tokens, top_k = ids.shape
    count = tokens * top_k
    # Every expert in use has at most one tile that is not full.
    used = min(experts, count)
    most = used + (count - used) // rows
    pairs = torch.empty(count, dtype=torch.int32, device=ids.device)
    table = torch.empty(1 + 3 * most, dtype=torch.int32, device=ids.device)
    _sort_kernel[(experts,)](
        ids,
        pairs,
        table,
        count,
        ids.stride(0),
        experts=experts,
        expert_lanes=triton.next_power_of_2(experts),
        top_k=top_k,
        tile_rows=rows,
        chunk=min(_CHUNK, max(_LEAST_CHUNK, triton.next_power_of_2(count))),
        num_warps=4,
    )
    return Tiles(pairs, table, most)


@triton.jit
def _sort_kernel(
    ids,
    pairs,
    table,
    count,
    ids_stride,
    experts: tl.constexpr,
    top_k: tl.constexpr,
    expert_lanes: tl.constexpr,
    tile_rows: tl.constexpr,
    chunk: tl.constexpr,
):
    """A program per expert: counts all pairs by expert, then writes its pairs and tiles."""
    expert = tl.program_id(0)
    lanes = tl.arange(0, chunk)
    all_experts = tl.arange(0, expert_lanes)
    counts = tl.zeros([expert_lanes], tl.int32)
    start = 0
    while start < count:
        pair = start + lanes
        source = ids + (pair // top_k).to(tl.int64) * ids_stride + pair % top_k
        chosen = tl.load(source, mask=pair < count, other=-1).to(tl.int32)
        counts += tl.histogram(chosen, expert_lanes, mask=(chosen >= 0) & (chosen < experts))
        start += chunk
    tiles = (counts + tile_rows - 1) // tile_rows
    first_pair = tl.sum(tl.where(all_experts < expert, counts, 0), axis=0)
    first_tile = tl.sum(tl.where(all_experts < expert, tiles, 0), axis=0)
    expert_pairs = tl.sum(tl.where(all_experts == expert, counts, 0), axis=0)
    expert_tiles = (expert_pairs + tile_rows - 1) // tile_rows
    if expert == 0:
        tl.store(table, tl.sum(tiles, axis=0))

    done = 0
    start = 0
    while start < count:
        pair = start + lanes
        source = ids + (pair // top_k).to(tl.int64) * ids_stride + pair % top_k
        chosen = tl.load(source, mask=pair < count, other=-1).to(tl.int32)
        matches = (chosen == expert).to(tl.int32)
        position = first_pair + done + tl.cumsum(matches, axis=0) - matches
        tl.store(pairs + position, pair, mask=matches > 0)
        done += tl.sum(matches, axis=0)
        # An expert has no more tiles than the pairs that this loop walks.
        entry = table + 1 + 3 * (first_tile + pair)
        within = pair < expert_tiles
        tl.store(entry, expert + tl.zeros([chunk], tl.int32), mask=within)
        tl.store(entry + 1, first_pair + pair * tile_rows, mask=within)
        tl.store(entry + 2, tl.minimum(expert_pairs - pair * tile_rows, tile_rows), mask=within)
        start += chunk
