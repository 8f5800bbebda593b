# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Which tokens every expert multiplies: pairs sorted by expert and cut into tiles, on the device.

A pair is a token and one of its slots, token * k + slot. Programs that multiply walk a table of
tiles whose length stands on the device too, so that nothing is read back and a launch depends on
shapes alone. The order is stable and uses no atomics on memory.
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
    """`pairs` [T * k] int32, sorted by expert; those without an expert are missing at the end.

    `table` int32: the number of tiles, then (expert, first of its sorted pairs, rows) of each.
    `most` bounds the number of tiles, whatever the ids.
    """

    pairs: Tensor
    table: Tensor
    most: int


def sort_by_expert(ids: Tensor, experts: int, rows: int) -> Tiles:
    """ids [T, k] int64 of 0..experts-1 or -1 for none -> tiles of at most `rows` pairs."""
    assert ids.stride(1) == 1
    tokens, top_k = ids.shape
    count = tokens * top_k
    # Every expert in use has one tile that need not be full; its others are.
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
    expert = tl.program_id(0)
    lanes = tl.arange(0, chunk)
    every = tl.arange(0, expert_lanes)
    counts = tl.zeros([expert_lanes], tl.int32)
    start = 0
    while start < count:
        pair = start + lanes
        source = ids + (pair // top_k).to(tl.int64) * ids_stride + pair % top_k
        chosen = tl.load(source, mask=pair < count, other=-1).to(tl.int32)
        counts += tl.histogram(chosen, expert_lanes, mask=(chosen >= 0) & (chosen < experts))
        start += chunk
    tiles = (counts + tile_rows - 1) // tile_rows
    first_pair = tl.sum(tl.where(every < expert, counts, 0), axis=0)
    first_tile = tl.sum(tl.where(every < expert, tiles, 0), axis=0)
    own_count = tl.sum(tl.where(every == expert, counts, 0), axis=0)
    own_tiles = (own_count + tile_rows - 1) // tile_rows
    if expert == 0:
        tl.store(table, tl.sum(tiles, axis=0))

    done = 0
    start = 0
    while start < count:
        pair = start + lanes
        source = ids + (pair // top_k).to(tl.int64) * ids_stride + pair % top_k
        chosen = tl.load(source, mask=pair < count, other=-1).to(tl.int32)
        mine = (chosen == expert).to(tl.int32)
        place = first_pair + done + tl.cumsum(mine, axis=0) - mine
        tl.store(pairs + place, pair, mask=mine > 0)
        done += tl.sum(mine, axis=0)
        # An expert has no more tiles than the pairs that this loop walks.
        entry = table + 1 + 3 * (first_tile + pair)
        within = pair < own_tiles
        tl.store(entry, expert + tl.zeros([chunk], tl.int32), mask=within)
        tl.store(entry + 1, first_pair + pair * tile_rows, mask=within)
        tl.store(entry + 2, tl.minimum(own_count - pair * tile_rows, tile_rows), mask=within)
        start += chunk
