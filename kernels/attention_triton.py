# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Attention of new tokens over paged K/V and their own, on a GPU: one pass over the keys.

    partial(split) = softmax over the split's keys: maximum, total, weighted values, all fp32
    o              = the partials merged in split order

A program holds a tile of folded query rows, (token, query head of one KV head), and walks the keys
of one split in tiles; the row's new tokens come after the context in its last split. A split is a
run of whole pages; how many there are depends on the row's visible tokens, but it is one if the
row has more than SHORT_TOKENS new tokens: those fill a GPU with query tiles. The grid is as large
as the page table's width allows, and programs without work return at once.

What a row gets depends, in its last bits, on two things beside the row: whether `rows.max_seqlen`
times the query heads of a KV head is at most FEW_ROWS (a pass of single tokens), at most BLOCK_ROWS
or above, and how many rows there are, as splits are longer where rows alone fill the device
(`longer_splits`).
Source: Dao et al. 2022 (FlashAttention) and 2023 (Flash-Decoding).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower.kernels.attention import MAX_SPLITS, SHORT_TOKENS, PagedKeyValues
from twotower.kernels.rows import Rows

# Folded query rows of single tokens, and of blocks of 64 tokens of 16 heads; more are a piece of a
# prompt, whose tiles fill a GPU by themselves.
FEW_ROWS, BLOCK_ROWS = 16, 1024
MAX_HEAD_DIM = 128
_STORED_TOKENS = 16
_MERGED_ROWS = 4
_MERGED_SPLITS = 16
# Programs up to which splits are as short as their partials allow, and how much longer they get.
_FULL, _LONGEST = 32, 8


@dataclass(frozen=True, slots=True)
class Tiling:
    """Query rows and keys of a tile; a context has ceil(tokens / split_tokens) splits, at most
    max_splits."""

    rows: int
    keys: int
    warps: int
    stages: int
    split_tokens: int
    max_splits: int

    def splits(self, tokens: int) -> int:
        """An upper bound of the splits of a context of at most `tokens`."""
        return min(max(-(-tokens // self.split_tokens), 1), self.max_splits)


# A split's partials weigh as much as the K/V of one token for each of its folded rows: the fewer
# rows, the shorter a split may be. In fp32, products hold their operands in registers.
_SINGLE = Tiling(rows=16, keys=64, warps=4, stages=3, split_tokens=256, max_splits=64)
_BLOCK = Tiling(64, 64, warps=4, stages=3, split_tokens=512, max_splits=MAX_SPLITS)
_PIECE = Tiling(128, 64, warps=8, stages=3, split_tokens=512, max_splits=MAX_SPLITS)
_WIDE = Tiling(16, 32, warps=4, stages=2, split_tokens=512, max_splits=MAX_SPLITS)


def attention(
    q: Tensor, k_new: Tensor, v_new: Tensor, context: PagedKeyValues, rows: Rows, causal: bool
) -> Tensor:
    """q [T, nq, hd], k_new and v_new [T, nkv, hd] -> [T, nq * hd] in q's dtype; softmax in fp32.

    Each row's tokens see the visible part of their context and their row's new tokens; outputs of
    padding are not written. Pages of fewer tokens than a tile has keys are read slowly, token by
    token. Raises ValueError for dtypes that differ and hd above MAX_HEAD_DIM.
    """
    _check(q, k_new, v_new, context)
    tokens, heads, width = q.shape
    kv_heads = k_new.shape[1]
    per_kv = heads // kv_heads
    out = torch.empty(tokens, heads * width, dtype=q.dtype, device=q.device)
    if tokens == 0:
        return out
    folded = rows.max_seqlen * per_kv
    tiling = tiling_for(q.dtype, folded)
    longer = longer_splits(rows.count * kv_heads * triton.cdiv(folded, tiling.rows))
    tiling = replace(tiling, split_tokens=tiling.split_tokens * longer)
    splits = tiling.splits(rows.pages.shape[1] * rows.page_tokens)
    short = min(rows.max_seqlen, SHORT_TOKENS)
    partials = _partials((splits if splits > 1 else 0, rows.count, short, heads), width, q.device)
    own = (rows.cu_seqlens, rows.slots, rows.context_lens)
    sizes = {
        "WIDTH": width,
        "BLOCK_D": _padded(width),
        "PAGE": rows.page_tokens,
        "SPLITS": splits,
        "SPLIT_TOKENS": tiling.split_tokens,
        "SHORT_TOKENS": SHORT_TOKENS,
    }
    tiles = triton.cdiv(rows.max_seqlen * per_kv, tiling.rows)
    short_tiles = triton.cdiv(short * per_kv, tiling.rows)
    _attention_kernel[(tiles + (splits - 1) * short_tiles, kv_heads, rows.count)](
        *(q, k_new, v_new, context.k, context.v, out, *partials, *own, rows.pages),
        *(*q.stride()[:2], *k_new.stride()[:2], *context.k.stride()[:2], rows.pages.stride(0)),
        short,
        SCALE=width**-0.5 * math.log2(math.e),
        PER_KV=per_kv,
        BLOCK_M=tiling.rows,
        BLOCK_N=tiling.keys,
        CAUSAL=causal,
        **sizes,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    if splits > 1:
        _merge_kernel[(triton.cdiv(short * heads, _MERGED_ROWS), rows.count)](
            *(out, *partials, *own, short),
            HEADS=heads,
            BLOCK_M=_MERGED_ROWS,
            GROUP=min(splits, _MERGED_SPLITS),
            **sizes,
            num_warps=4,
        )
    return out


def store_kv(k_new: Tensor, v_new: Tensor, context: PagedKeyValues, rows: Rows) -> None:
    """k_new and v_new [T, nkv, hd]: writes each row's new tokens behind its visible ones, into
    pages that the table must hold. Raises ValueError for dtypes that differ."""
    _check(k_new, k_new, v_new, context)
    tokens, kv_heads, width = k_new.shape
    if tokens == 0:
        return
    _store_kernel[(triton.cdiv(rows.max_seqlen, _STORED_TOKENS), kv_heads, rows.count)](
        *(
            k_new,
            v_new,
            context.k,
            context.v,
            rows.cu_seqlens,
            rows.slots,
            rows.context_lens,
            rows.pages,
        ),
        *(*k_new.stride()[:2], *context.k.stride()[:2], rows.pages.stride(0)),
        WIDTH=width,
        BLOCK_T=_STORED_TOKENS,
        BLOCK_D=_padded(width),
        PAGE=rows.page_tokens,
        num_warps=4,
    )


def _partials(shape: tuple[int, ...], width: int, device: torch.device) -> tuple[Tensor, ...]:
    """Room for maxima, totals [splits, B, short, nq] and values [splits, B, short, nq, hd]: 0.5 GB
    for 128 rows of 16 tokens, 32 heads of 128 and 16 splits, whatever the rows use of it."""
    shapes = (shape, shape, (*shape, width))
    return tuple(torch.empty(own, dtype=torch.float32, device=device) for own in shapes)


def tiling_for(dtype: torch.dtype, folded_rows: int) -> Tiling:
    """The tiles of a pass whose longest row has so many folded query rows."""
    if dtype.itemsize > 2:
        return _WIDE
    if folded_rows <= FEW_ROWS:
        return _SINGLE
    return _BLOCK if folded_rows <= BLOCK_ROWS else _PIECE


def longer_splits(programs: int) -> int:
    """How many times longer splits are where a pass has so many programs without any: splits are
    there to fill a device, and each writes and reads partials."""
    full = programs // _FULL
    return min(_LONGEST, 1 << (full.bit_length() - 1)) if full else 1


def _padded(width: int) -> int:
    """A product's operands have at least 16 columns, and a power of two."""
    return int(max(16, triton.next_power_of_2(width)))


def _check(q: Tensor, k_new: Tensor, v_new: Tensor, context: PagedKeyValues) -> None:
    tensors = (q, k_new, v_new, context.k, context.v)
    assert all(tensor.stride(-1) == 1 for tensor in tensors), "elements of a head are neighbours"
    assert k_new.stride() == v_new.stride(), "new K and V are laid out alike"
    assert context.k.stride() == context.v.stride(), "pools of K and V are laid out alike"
    kinds = {str(tensor.dtype) for tensor in tensors}
    if len(kinds) > 1:
        raise ValueError(f"q, K and V: got {', '.join(sorted(kinds))}, expected one dtype")
    if q.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(f"head_dim: got {q.shape[-1]}, expected at most {MAX_HEAD_DIM}")


@triton.jit(do_not_specialize=["short"])
def _attention_kernel(
    q,
    k_new,
    v_new,
    k_pool,
    v_pool,
    out,
    maxima,
    totals,
    values,
    cu_seqlens,
    slots,
    context_lens,
    pages,
    q_token,
    q_head,
    new_token,
    new_head,
    pool_head,
    pool_token,
    pages_slot,
    short,
    SCALE: tl.constexpr,
    PER_KV: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    SHORT_TOKENS: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """One tile of a row's folded queries over one split of its keys.

    Programs of axis 0: every tile's first split, then for rows of at most `short` tokens the
    tiles' second splits, third splits, and so on.
    """
    row = tl.program_id(2)
    head = tl.program_id(1)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    first = tl.load(cu_seqlens + row)
    length = tl.load(cu_seqlens + row + 1) - first
    seen = tl.load(context_lens + row)
    splits, span = _splits(seen, length, PAGE, SPLITS, SPLIT_TOKENS, SHORT_TOKENS)
    short_tiles = tl.cdiv(short * PER_KV, BLOCK_M)
    index = tl.program_id(0)
    tiles = tl.num_programs(0) - (SPLITS - 1) * short_tiles
    later = index - tiles
    split = tl.where(later < 0, 0, later // short_tiles + 1)
    # The last tile of a causal row has the most keys: it starts first.
    tile = tl.where(later < 0, tiles - 1 - index, later % short_tiles)
    if (tile * BLOCK_M >= length * PER_KV) | (split >= splits):
        return

    # Offsets inside a tile fit 32 bits; what they start from need not.
    folded = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token = folded // PER_KV
    near = tile * BLOCK_M // PER_KV
    lane = tl.arange(0, BLOCK_D)
    inside = (token < length)[:, None] & (lane < WIDTH)[None, :]
    q_tile = q + (first + near).to(tl.int64) * q_token + head * PER_KV * q_head
    at = (token - near) * q_token + folded % PER_KV * q_head
    query = tl.load(q_tile + at[:, None] + lane[None, :], mask=inside, other=0.0)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    key = tl.arange(0, BLOCK_N)

    begin = split * span
    here = tl.minimum(span, seen - begin)
    new = length
    sure = length
    if CAUSAL:
        new = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // PER_KV + 1, length)
        sure = near + 1
    if split < splits - 1:
        new = 0
    old_tiles = here // BLOCK_N
    new_tiles = tl.minimum(sure, new) // BLOCK_N
    table = pages + slot.to(tl.int64) * pages_slot
    pool = head.to(tl.int64) * pool_head
    own = first.to(tl.int64) * new_token + head * new_head

    # Tiles that all queries see whole. A page is looked up one tile ahead: the pipeline loads K/V
    # further ahead only if their addresses do not wait for another load.
    page = _pages(table, begin, key, BLOCK_N, old_tiles > 0, PAGE, BLOCK_N)
    for i in range(0, old_tiles + new_tiles):
        old = i < old_tiles
        start = tl.where(old, begin + i * BLOCK_N, (i - old_tiles) * BLOCK_N)
        base, offset = _places(
            page, start, key, old, pool, pool_token, own, new_token, PAGE, BLOCK_N
        )
        page = _pages(
            table, begin + (i + 1) * BLOCK_N, key, BLOCK_N, i + 1 < old_tiles, PAGE, BLOCK_N
        )
        k = _tile(tl.where(old, k_pool, k_new) + base, offset, None, lane, WIDTH, BLOCK_D)
        v = _tile(tl.where(old, v_pool, v_new) + base, offset, None, lane, WIDTH, BLOCK_D)
        maximum, total, acc = _absorb(query, k, v, None, maximum, total, acc, SCALE)

    # The rest: the end of the context, then the new tokens that not all queries see.
    old_rest = tl.cdiv(here, BLOCK_N) - old_tiles
    new_rest = tl.cdiv(new, BLOCK_N) - new_tiles
    for i in tl.range(0, old_rest + new_rest, num_stages=1):
        old = i < old_rest
        done = tl.where(old, old_tiles, new_tiles + i - old_rest) * BLOCK_N
        start = tl.where(old, begin, 0) + done
        left = tl.where(old, here, new) - done
        there = key < left
        page = _pages(table, start, key, left, old, PAGE, BLOCK_N)
        base, offset = _places(
            page, start, key, old, pool, pool_token, own, new_token, PAGE, BLOCK_N
        )
        k = _tile(tl.where(old, k_pool, k_new) + base, offset, there, lane, WIDTH, BLOCK_D)
        v = _tile(tl.where(old, v_pool, v_new) + base, offset, there, lane, WIDTH, BLOCK_D)
        shown = there[None, :]
        if CAUSAL:
            shown = shown & (old | (start + key[None, :] <= token[:, None]))
        maximum, total, acc = _absorb(query, k, v, shown, maximum, total, acc, SCALE)

    heads = tl.num_programs(1) * PER_KV
    at = (token - near) * heads + folded % PER_KV
    if SPLITS > 1:
        if splits > 1:
            part = (split * tl.num_programs(2) + row).to(tl.int64) * short + near
            part = part * heads + head * PER_KV
            tl.store(maxima + part + at, maximum, mask=token < length)
            tl.store(totals + part + at, total, mask=token < length)
            value = values + part * WIDTH + at[:, None] * WIDTH + lane[None, :]
            tl.store(value, acc, mask=inside)
            return
    out_tile = out + ((first + near).to(tl.int64) * heads + head * PER_KV) * WIDTH
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out_tile + at[:, None] * WIDTH + lane[None, :], result, mask=inside)


@triton.jit
def _splits(
    seen,
    length,
    PAGE: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    SHORT_TOKENS: tl.constexpr,
):
    """How many splits a row has, and the tokens of context in each but the last."""
    wanted = tl.minimum(tl.maximum(tl.cdiv(seen, SPLIT_TOKENS), 1), SPLITS)
    wanted = tl.where(length > SHORT_TOKENS, 1, wanted)
    pages = tl.maximum(tl.cdiv(seen, PAGE), 1)
    pages_each = tl.cdiv(pages, wanted)
    return tl.cdiv(pages, pages_each), pages_each * PAGE


@triton.jit
def _pages(table, start, key, left, old, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The pages of context tokens start + key, key < left: one page if it holds the whole tile.
    Any page of the table's row if they are not `old`."""
    if PAGE % BLOCK_N == 0:
        page = tl.load(table + tl.where(old, start // PAGE, 0))
    else:
        there = key < tl.where(old, left, 0)
        page = tl.load(table + (start + key) // PAGE, mask=there, other=0)
    return page


@triton.jit
def _places(
    page,
    start,
    key,
    old,
    pool,
    pool_token,
    own,
    new_token,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Where tokens start + key stand, a common base and an offset for each: in pages of the pool
    from `pool` on if they are `old`, else among the new tokens from `own` on."""
    new_base = own + start.to(tl.int64) * new_token
    first = page.to(tl.int64) * PAGE
    if PAGE % BLOCK_N == 0:
        base = tl.where(old, pool + (first + start % PAGE) * pool_token, new_base)
        offset = key * tl.where(old, pool_token, new_token)
    else:
        base = tl.where(old, pool, new_base)
        offset = tl.where(old, (first + (start + key) % PAGE) * pool_token, key * new_token)
    return base, offset


@triton.jit
def _tile(base, offset, there, lane, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of K or V at base + offset, [BLOCK_N, BLOCK_D]; zeros where there is nothing."""
    at = base + offset[:, None] + lane[None, :]
    if there is not None:
        tile = tl.load(at, mask=there[:, None] & (lane < WIDTH)[None, :], other=0.0)
    elif WIDTH < BLOCK_D:
        tile = tl.load(at, mask=(lane < WIDTH)[None, :], other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def _absorb(query, k, v, shown, maximum, total, acc, SCALE: tl.constexpr):
    """Moves the running softmax on by a tile of keys; maxima are in units of log2."""
    scores = tl.dot(query, tl.trans(k), input_precision="ieee")
    if shown is not None:
        scores = tl.where(shown, scores, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores, 1) * SCALE)
    weights = tl.exp2(scores * SCALE - new_maximum[:, None])
    shrink = tl.exp2(maximum - new_maximum)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return new_maximum, total, acc


@triton.jit(do_not_specialize=["short"])
def _merge_kernel(
    out,
    maxima,
    totals,
    values,
    cu_seqlens,
    slots,
    context_lens,
    short,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    SHORT_TOKENS: tl.constexpr,
):
    """A few (token, query head) pairs of one row: the partials of its splits, in their order."""
    row = tl.program_id(1)
    if tl.load(slots + row) < 0:
        return
    first = tl.load(cu_seqlens + row)
    length = tl.load(cu_seqlens + row + 1) - first
    seen = tl.load(context_lens + row)
    splits, _ = _splits(seen, length, PAGE, SPLITS, SPLIT_TOKENS, SHORT_TOKENS)
    if splits == 1:
        return
    pair = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = pair < length * HEADS
    lane = tl.arange(0, BLOCK_D)
    inside = there[:, None] & (lane < WIDTH)[None, :]
    part = row.to(tl.int64) * short * HEADS + pair
    stride = tl.num_programs(1).to(tl.int64) * short * HEADS
    maximum = tl.full([BLOCK_M], -1e38, tl.float32)
    for group in range(0, splits, GROUP):
        for i in tl.static_range(GROUP):
            kept = pair < tl.where(group + i < splits, length * HEADS, 0)
            own = tl.load(maxima + part + (group + i) * stride, mask=kept, other=-1e38)
            maximum = tl.maximum(maximum, own)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for group in range(0, splits, GROUP):
        for i in tl.static_range(GROUP):
            kept = pair < tl.where(group + i < splits, length * HEADS, 0)
            at = part + (group + i) * stride
            own = tl.load(maxima + at, mask=kept, other=-1e38)
            weight = tl.where(kept, tl.exp2(own - maximum), 0.0)
            total += weight * tl.load(totals + at, mask=kept, other=0.0)
            value = values + at[:, None] * WIDTH + lane[None, :]
            mask = kept[:, None] & (lane < WIDTH)[None, :]
            acc += weight[:, None] * tl.load(value, mask=mask, other=0.0)
    total = tl.where(there, total, 1.0)
    at = first.to(tl.int64) * HEADS + pair
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + at[:, None] * WIDTH + lane[None, :], result, mask=inside)


@triton.jit
def _store_kernel(
    k_new,
    v_new,
    k_pool,
    v_pool,
    cu_seqlens,
    slots,
    context_lens,
    pages,
    new_token,
    new_head,
    pool_head,
    pool_token,
    pages_slot,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Some new tokens of one row and KV head into the row's pages."""
    row = tl.program_id(2)
    head = tl.program_id(1)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    first = tl.load(cu_seqlens + row)
    length = tl.load(cu_seqlens + row + 1) - first
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    there = token < length
    lane = tl.arange(0, BLOCK_D)
    inside = there[:, None] & (lane < WIDTH)[None, :]
    position = tl.load(context_lens + row) + token
    table = pages + slot.to(tl.int64) * pages_slot
    page = tl.load(table + position // PAGE, mask=there, other=0)
    place = page.to(tl.int64) * PAGE + position % PAGE
    source = (first + token).to(tl.int64) * new_token + head * new_head
    source = source[:, None] + lane[None, :]
    target = head.to(tl.int64) * pool_head + place * pool_token
    target = target[:, None] + lane[None, :]
    tl.store(k_pool + target, tl.load(k_new + source, mask=inside), mask=inside)
    tl.store(v_pool + target, tl.load(v_new + source, mask=inside), mask=inside)
