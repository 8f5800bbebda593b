# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Attention of new tokens over paged K/V and the new K/V, on a GPU: a single pass over the keys.

    o              = softmax(q [K_ctx | K_new]^T / sqrt(hd)) [V_ctx | V_new]
    partial(split) = softmax over the split's keys: maximum, total, weighted values, all fp32
    o              = the partials merged in split order

A program holds a tile of folded query rows, (token, query head of one KV head), and walks the keys
of one split in tiles; the row's new tokens come after the context in its last split. A split is a
run of whole pages. The number of splits depends on the row's context length, but rows of more than
SHORT_TOKENS new tokens have a single split: they fill a GPU with query tiles. The grid is as large
as the page table's width allows, and programs without work return at once.

Besides the row, the last bits of its result depend on two things: whether `rows.max_seqlen` times
the query heads of a KV head is at most FEW_ROWS (a pass of single tokens), at most BLOCK_ROWS or
above, and the number of rows, as splits are longer where rows alone fill the device
(`longer_splits`) and a card's table may tell numbers of rows apart. Inside `deterministic` it
depends on neither.
Source: Dao et al. 2022 (FlashAttention), section 3.1; Dao et al. 2023 (Flash-Decoding).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower.kernels.attention import MAX_SPLITS, SHORT_TOKENS, PagedKeyValues
from twotower.kernels.determinism import is_deterministic
from twotower.kernels.launch_table import tuned
from twotower.kernels.overlap_triton import overlap, wait
from twotower.kernels.rows import Rows

# Most folded query rows of a pass of single tokens, and of blocks (64 tokens of 16 heads). A pass
# with more has pieces of prompts, whose tiles fill a GPU by themselves.
FEW_ROWS, BLOCK_ROWS = 16, 1024
MAX_HEAD_DIM = 128
_STORED_TOKENS = 16
_MERGED_ROWS = 4
_MERGED_SPLITS = 16
# Splits are as short as their partials allow up to so many programs, and at most so many times
# longer above.
_FULL, _LONGEST = 32, 8


@dataclass(frozen=True, slots=True)
class Tiling:
    """Query rows and keys of a tile, warps and pipeline stages; a context has
    ceil(tokens / split_tokens) splits, at most max_splits."""

    rows: int
    keys: int
    warps: int
    stages: int
    split_tokens: int
    max_splits: int

    def splits(self, tokens: int) -> int:
        """An upper bound of the splits of a context of at most `tokens`."""
        return min(max(-(-tokens // self.split_tokens), 1), self.max_splits)


# A split's partials take as many bytes as the K/V of one token per folded row: the fewer rows, the
# shorter a split may be. In fp32, products hold their operands in registers.
_SINGLE = Tiling(rows=16, keys=64, warps=4, stages=3, split_tokens=256, max_splits=64)
_BLOCK = Tiling(64, 64, warps=4, stages=3, split_tokens=512, max_splits=MAX_SPLITS)
_PIECE = Tiling(128, 64, warps=8, stages=3, split_tokens=512, max_splits=MAX_SPLITS)
_WIDE = Tiling(16, 32, warps=4, stages=2, split_tokens=512, max_splits=MAX_SPLITS)


def attention(
    q: Tensor, k_new: Tensor, v_new: Tensor, context: PagedKeyValues, rows: Rows, causal: bool
) -> Tensor:
    """q [T, nq, hd], k_new and v_new [T, nkv, hd] -> [T, nq * hd] in q's dtype; softmax in fp32.

    A row's tokens attend to the first context_lens[row] tokens of its context and to its new
    tokens, if `causal` up to themselves. Outputs of padding are not written. Pages of fewer tokens
    than a tile has keys are read slowly, token by token. Raises ValueError for dtypes that differ
    and hd above MAX_HEAD_DIM.
    """
    _check(q, k_new, v_new, context)
    tokens, heads, head_dim = q.shape
    kv_heads = k_new.shape[1]
    per_kv = heads // kv_heads
    out = torch.empty(tokens, heads * head_dim, dtype=q.dtype, device=q.device)
    if tokens == 0:
        return out
    folded = rows.max_seqlen * per_kv
    tiling = _tuned_tiling(q, folded, rows.count, kv_heads)
    splits = tiling.splits(rows.pages.shape[1] * rows.page_tokens)
    short = min(rows.max_seqlen, SHORT_TOKENS)
    partials = _partials(
        (splits if splits > 1 else 0, rows.count, short, heads), head_dim, q.device
    )
    row_tensors = (rows.cu_seqlens, rows.slots, rows.context_lens)
    sizes = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": _padded(head_dim),
        "PAGE": rows.page_tokens,
        "SPLITS": splits,
        "SPLIT_TOKENS": tiling.split_tokens,
        "SHORT_TOKENS": SHORT_TOKENS,
    }
    tiles = triton.cdiv(rows.max_seqlen * per_kv, tiling.rows)
    short_tiles = triton.cdiv(short * per_kv, tiling.rows)
    _attention_kernel[(tiles + (splits - 1) * short_tiles, kv_heads, rows.count)](
        *(q, k_new, v_new, context.k, context.v, out, *partials, *row_tensors, rows.pages),
        *(*q.stride()[:2], *k_new.stride()[:2], *context.k.stride()[:2], rows.pages.stride(0)),
        short,
        SCALE=head_dim**-0.5 * math.log2(math.e),
        PER_KV=per_kv,
        BLOCK_M=tiling.rows,
        BLOCK_N=tiling.keys,
        CAUSAL=causal,
        **sizes,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        **overlap(q.device),
    )
    if splits > 1:
        _merge_kernel[(triton.cdiv(short * heads, _MERGED_ROWS), rows.count)](
            *(out, *partials, *row_tensors, short),
            HEADS=heads,
            BLOCK_M=_MERGED_ROWS,
            GROUP=min(splits, _MERGED_SPLITS),
            **sizes,
            num_warps=4,
            **overlap(q.device),
        )
    return out


def store_kv(k_new: Tensor, v_new: Tensor, context: PagedKeyValues, rows: Rows) -> None:
    """Writes k_new and v_new [T, nkv, hd] into the pool: each row's new tokens follow the
    context_lens[row] tokens that it has, in pages that `rows.pages` must list. Raises ValueError
    for dtypes that differ."""
    _check(k_new, k_new, v_new, context)
    tokens, kv_heads, head_dim = k_new.shape
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
        HEAD_DIM=head_dim,
        BLOCK_T=_STORED_TOKENS,
        BLOCK_D=_padded(head_dim),
        PAGE=rows.page_tokens,
        num_warps=4,
        **overlap(k_new.device),
    )


def _partials(shape: tuple[int, ...], head_dim: int, device: torch.device) -> tuple[Tensor, ...]:
    """Empty maxima and totals [splits, B, short, nq] and values [splits, B, short, nq, hd], fp32:
    0.5 GB for 128 rows of 16 tokens, 32 heads of 128 and 16 splits, used or not."""
    shapes = (shape, shape, (*shape, head_dim))
    return tuple(torch.empty(size, dtype=torch.float32, device=device) for size in shapes)


def tiling_for(dtype: torch.dtype, folded_rows: int) -> Tiling:
    """The tiling of a pass whose longest row has `folded_rows` (token, query head) pairs per KV
    head."""
    if dtype.itemsize > 2:
        return _WIDE
    if folded_rows <= FEW_ROWS:
        return _SINGLE
    return _BLOCK if folded_rows <= BLOCK_ROWS else _PIECE


def _tuned_tiling(q: Tensor, folded_rows: int, rows: int, kv_heads: int) -> Tiling:
    """The tiling of a pass over so many rows, splits longer where it has many programs, or what a
    table of the card says: those are measured with narrow numbers. Inside `deterministic` one for
    all passes."""
    if is_deterministic():
        return tiling_for(q.dtype, BLOCK_ROWS)
    tiling = tiling_for(q.dtype, folded_rows)
    longer = longer_splits(rows * kv_heads * triton.cdiv(folded_rows, tiling.rows))
    tiling = replace(tiling, split_tokens=tiling.split_tokens * longer)
    if q.dtype.itemsize > 2:
        return tiling
    kind = "token" if folded_rows <= FEW_ROWS else "block"
    kind = kind if folded_rows <= BLOCK_ROWS else "piece"
    return tuned(f"attention_{kind}", rows, tiling, q.device)


def longer_splits(programs: int) -> int:
    """Factor by which splits are longer in a pass that has `programs` programs without splits.

    Splits exist to fill the device, and each costs writing and reading its partials.
    """
    full = programs // _FULL
    return min(_LONGEST, 1 << (full.bit_length() - 1)) if full else 1


def _padded(head_dim: int) -> int:
    """Columns of a product's operand that holds a head: a power of two, at least 16."""
    return int(max(16, triton.next_power_of_2(head_dim)))


def _check(q: Tensor, k_new: Tensor, v_new: Tensor, context: PagedKeyValues) -> None:
    """Asserts layouts that the kernels assume; raises ValueError for dtypes and head sizes."""
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
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    SHORT_TOKENS: tl.constexpr,
    CAUSAL: tl.constexpr,
    waits: tl.constexpr,
):
    """A program per (tile of folded queries and split of the keys, KV head, row).

    Axis 0: the first splits of all tiles, then, for rows of at most `short` tokens, the tiles'
    second splits, third splits, and so on.
    """
    wait(waits)
    row = tl.program_id(2)
    head = tl.program_id(1)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    first = tl.load(cu_seqlens + row)
    length = tl.load(cu_seqlens + row + 1) - first
    context_len = tl.load(context_lens + row)
    splits, span = _splits(context_len, length, PAGE, SPLITS, SPLIT_TOKENS, SHORT_TOKENS)
    short_tiles = tl.cdiv(short * PER_KV, BLOCK_M)
    index = tl.program_id(0)
    tiles = tl.num_programs(0) - (SPLITS - 1) * short_tiles
    later = index - tiles
    split = tl.where(later < 0, 0, later // short_tiles + 1)
    # The last tile of a causal row has the most keys, so it starts first.
    tile = tl.where(later < 0, tiles - 1 - index, later % short_tiles)
    if (tile * BLOCK_M >= length * PER_KV) | (split >= splits):
        return

    # Offsets inside a tile fit 32 bits; the tile's base address may not.
    folded = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token = folded // PER_KV
    first_token = tile * BLOCK_M // PER_KV
    lane = tl.arange(0, BLOCK_D)
    inside = (token < length)[:, None] & (lane < HEAD_DIM)[None, :]
    q_tile = q + (first + first_token).to(tl.int64) * q_token + head * PER_KV * q_head
    at = (token - first_token) * q_token + folded % PER_KV * q_head
    query = tl.load(q_tile + at[:, None] + lane[None, :], mask=inside, other=0.0)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    key = tl.arange(0, BLOCK_N)

    begin = split * span
    split_len = tl.minimum(span, context_len - begin)
    new_len = length
    visible_to_all = length
    if CAUSAL:
        new_len = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // PER_KV + 1, length)
        visible_to_all = first_token + 1
    if split < splits - 1:
        new_len = 0
    context_tiles = split_len // BLOCK_N
    new_tiles = tl.minimum(visible_to_all, new_len) // BLOCK_N
    table = pages + slot.to(tl.int64) * pages_slot
    pool = head.to(tl.int64) * pool_head
    new_start = first.to(tl.int64) * new_token + head * new_head

    # Tiles of which all queries see all keys. A page is looked up one tile ahead: the pipeline
    # loads K/V further ahead only if their addresses do not wait for another load.
    page = _pages(table, begin, key, BLOCK_N, context_tiles > 0, PAGE, BLOCK_N)
    for i in range(0, context_tiles + new_tiles):
        in_context = i < context_tiles
        start = tl.where(in_context, begin + i * BLOCK_N, (i - context_tiles) * BLOCK_N)
        base, offset = _kv_offsets(
            page, start, key, in_context, pool, pool_token, new_start, new_token, PAGE, BLOCK_N
        )
        page = _pages(
            table, begin + (i + 1) * BLOCK_N, key, BLOCK_N, i + 1 < context_tiles, PAGE, BLOCK_N
        )
        k = _tile(tl.where(in_context, k_pool, k_new) + base, offset, None, lane, HEAD_DIM, BLOCK_D)
        v = _tile(tl.where(in_context, v_pool, v_new) + base, offset, None, lane, HEAD_DIM, BLOCK_D)
        maximum, total, acc = _absorb(query, k, v, None, maximum, total, acc, SCALE)

    # The rest: the end of the context, then the new tokens that not all queries see.
    context_rest = tl.cdiv(split_len, BLOCK_N) - context_tiles
    new_rest = tl.cdiv(new_len, BLOCK_N) - new_tiles
    for i in tl.range(0, context_rest + new_rest, num_stages=1):
        in_context = i < context_rest
        done = tl.where(in_context, context_tiles, new_tiles + i - context_rest) * BLOCK_N
        start = tl.where(in_context, begin, 0) + done
        left = tl.where(in_context, split_len, new_len) - done
        valid = key < left
        page = _pages(table, start, key, left, in_context, PAGE, BLOCK_N)
        base, offset = _kv_offsets(
            page, start, key, in_context, pool, pool_token, new_start, new_token, PAGE, BLOCK_N
        )
        k = _tile(
            tl.where(in_context, k_pool, k_new) + base, offset, valid, lane, HEAD_DIM, BLOCK_D
        )
        v = _tile(
            tl.where(in_context, v_pool, v_new) + base, offset, valid, lane, HEAD_DIM, BLOCK_D
        )
        shown = valid[None, :]
        if CAUSAL:
            shown = shown & (in_context | (start + key[None, :] <= token[:, None]))
        maximum, total, acc = _absorb(query, k, v, shown, maximum, total, acc, SCALE)

    heads = tl.num_programs(1) * PER_KV
    at = (token - first_token) * heads + folded % PER_KV
    if SPLITS > 1:
        if splits > 1:
            part = (split * tl.num_programs(2) + row).to(tl.int64) * short + first_token
            part = part * heads + head * PER_KV
            tl.store(maxima + part + at, maximum, mask=token < length)
            tl.store(totals + part + at, total, mask=token < length)
            value = values + part * HEAD_DIM + at[:, None] * HEAD_DIM + lane[None, :]
            tl.store(value, acc, mask=inside)
            return
    out_tile = out + ((first + first_token).to(tl.int64) * heads + head * PER_KV) * HEAD_DIM
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out_tile + at[:, None] * HEAD_DIM + lane[None, :], result, mask=inside)


@triton.jit
def _splits(
    context_len,
    length,
    PAGE: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    SHORT_TOKENS: tl.constexpr,
):
    """Number of splits of a row, and the context tokens in each but the last."""
    wanted = tl.minimum(tl.maximum(tl.cdiv(context_len, SPLIT_TOKENS), 1), SPLITS)
    wanted = tl.where(length > SHORT_TOKENS, 1, wanted)
    pages = tl.maximum(tl.cdiv(context_len, PAGE), 1)
    pages_each = tl.cdiv(pages, wanted)
    return tl.cdiv(pages, pages_each), pages_each * PAGE


@triton.jit
def _pages(table, start, key, left, in_context, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The pages of context tokens start + key, key < left: a single page if it holds the whole
    tile. Any page of the row's `table` for tokens that are not `in_context`."""
    if PAGE % BLOCK_N == 0:
        page = tl.load(table + tl.where(in_context, start // PAGE, 0))
    else:
        valid = key < tl.where(in_context, left, 0)
        page = tl.load(table + (start + key) // PAGE, mask=valid, other=0)
    return page


@triton.jit
def _kv_offsets(
    page,
    start,
    key,
    in_context,
    pool,
    pool_token,
    new_start,
    new_token,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Element offsets of tokens start + key in K or V, as a common base and an offset for each: in
    the pool, whose head starts at `pool`, if they are `in_context`, else among the row's new
    tokens, which start at `new_start`."""
    new_base = new_start + start.to(tl.int64) * new_token
    first = page.to(tl.int64) * PAGE
    if PAGE % BLOCK_N == 0:
        base = tl.where(in_context, pool + (first + start % PAGE) * pool_token, new_base)
        offset = key * tl.where(in_context, pool_token, new_token)
    else:
        base = tl.where(in_context, pool, new_base)
        offset = tl.where(in_context, (first + (start + key) % PAGE) * pool_token, key * new_token)
    return base, offset


@triton.jit
def _tile(base, offset, valid, lane, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of K or V at base + offset, [BLOCK_N, BLOCK_D]; zeros where there is nothing."""
    at = base + offset[:, None] + lane[None, :]
    if valid is not None:
        tile = tl.load(at, mask=valid[:, None] & (lane < HEAD_DIM)[None, :], other=0.0)
    elif HEAD_DIM < BLOCK_D:
        tile = tl.load(at, mask=(lane < HEAD_DIM)[None, :], other=0.0)
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
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    SHORT_TOKENS: tl.constexpr,
    waits: tl.constexpr,
):
    """A program per (some (token, query head) pairs, row): merges the partials of the row's splits
    in their order."""
    wait(waits)
    row = tl.program_id(1)
    if tl.load(slots + row) < 0:
        return
    first = tl.load(cu_seqlens + row)
    length = tl.load(cu_seqlens + row + 1) - first
    context_len = tl.load(context_lens + row)
    splits, _ = _splits(context_len, length, PAGE, SPLITS, SPLIT_TOKENS, SHORT_TOKENS)
    if splits == 1:
        return
    pair = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = pair < length * HEADS
    lane = tl.arange(0, BLOCK_D)
    inside = valid[:, None] & (lane < HEAD_DIM)[None, :]
    part = row.to(tl.int64) * short * HEADS + pair
    stride = tl.num_programs(1).to(tl.int64) * short * HEADS
    maximum = tl.full([BLOCK_M], -1e38, tl.float32)
    for group in range(0, splits, GROUP):
        for i in tl.static_range(GROUP):
            kept = pair < tl.where(group + i < splits, length * HEADS, 0)
            found = tl.load(maxima + part + (group + i) * stride, mask=kept, other=-1e38)
            maximum = tl.maximum(maximum, found)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for group in range(0, splits, GROUP):
        for i in tl.static_range(GROUP):
            kept = pair < tl.where(group + i < splits, length * HEADS, 0)
            at = part + (group + i) * stride
            found = tl.load(maxima + at, mask=kept, other=-1e38)
            weight = tl.where(kept, tl.exp2(found - maximum), 0.0)
            total += weight * tl.load(totals + at, mask=kept, other=0.0)
            value = values + at[:, None] * HEAD_DIM + lane[None, :]
            mask = kept[:, None] & (lane < HEAD_DIM)[None, :]
            acc += weight[:, None] * tl.load(value, mask=mask, other=0.0)
    total = tl.where(valid, total, 1.0)
    at = first.to(tl.int64) * HEADS + pair
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + at[:, None] * HEAD_DIM + lane[None, :], result, mask=inside)


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
    HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    waits: tl.constexpr,
):
    """A program per (some new tokens, KV head, row): copies their K/V into the row's pages."""
    wait(waits)
    row = tl.program_id(2)
    head = tl.program_id(1)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    first = tl.load(cu_seqlens + row)
    length = tl.load(cu_seqlens + row + 1) - first
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    valid = token < length
    lane = tl.arange(0, BLOCK_D)
    inside = valid[:, None] & (lane < HEAD_DIM)[None, :]
    position = tl.load(context_lens + row) + token
    table = pages + slot.to(tl.int64) * pages_slot
    page = tl.load(table + position // PAGE, mask=valid, other=0)
    pool_position = page.to(tl.int64) * PAGE + position % PAGE
    source = (first + token).to(tl.int64) * new_token + head * new_head
    source = source[:, None] + lane[None, :]
    target = head.to(tl.int64) * pool_head + pool_position * pool_token
    target = target[:, None] + lane[None, :]
    tl.store(k_pool + target, tl.load(k_new + source, mask=inside), mask=inside)
    tl.store(v_pool + target, tl.load(v_new + source, mask=inside), mask=inside)
