"""Attention of new tokens over a context's K/V and the new K/V, without position encodings.

    o = softmax(q [K_ctx | K_new]^T / sqrt(hd)) [V_ctx | V_new]

Tokens of a denoiser block attend to the whole context and the whole block (bidirectional); those of
a prefill or an extension attend to the whole context and to new tokens up to themselves (causal).
Query head j uses KV head j // (nq / nkv), so all query heads of a KV head are folded into its rows
and K/V are read in place, once. Keys are walked in tiles of a fixed size with a running maximum:
memory does not grow with the context, and a row's result depends on no other row. The context's K/V
are in pages; a tile whose pages are neighbours is read in place.
Source: Milakov and Gimelshein 2018; Dao et al. 2022 (FlashAttention), section 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.kernels.rows import Rows

# A softmax in progress: maximum and total [nkv, R, 1], weighted values [nkv, R, hd], fp32.
_Softmax = tuple[Tensor, Tensor, Tensor]

_TILE = 1024
# The GPU kernel cuts a context into at most MAX_SPLITS splits for rows of up to SHORT_TOKENS new
# tokens; passes of single tokens may have more (see attention_triton.py).
SHORT_TOKENS = 64
MAX_SPLITS = 16


@dataclass(frozen=True, slots=True)
class PagedKeyValues:
    """One attention layer's K/V pool of all rows, `k` and `v` [nkv, pool tokens, hd]: page p is the
    pool's tokens p * page_tokens to (p + 1) * page_tokens - 1."""

    k: Tensor
    v: Tensor


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


def attention(
    q: Tensor, k_new: Tensor, v_new: Tensor, context: PagedKeyValues, rows: Rows, causal: bool
) -> Tensor:
    """q [T, nq, hd], k_new and v_new [T, nkv, hd] -> [T, nq * hd] in q's dtype; softmax in fp32.

    A row's tokens attend to the first context_lens[row] tokens of its context and to its new
    tokens, if `causal` up to themselves. Padding gives zeros.
    """
    outputs = []
    for row in range(rows.count):
        span = rows.host.slice_of(row)
        if rows.host.slots[row] < 0:
            outputs.append(q.new_zeros(span.stop - span.start, q.shape[1] * q.shape[2]))
            continue
        k_row, v_row = k_new[span].transpose(0, 1), v_new[span].transpose(0, 1)
        tiles = _tiles(context, rows, row)
        outputs.append(_attend(q[span], tiles, k_row.contiguous(), v_row.contiguous(), causal))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def store_kv(k_new: Tensor, v_new: Tensor, context: PagedKeyValues, rows: Rows) -> None:
    """Writes k_new and v_new [T, nkv, hd] into the pool: each row's new tokens follow the
    context_lens[row] tokens that it has."""
    for row in range(rows.count):
        span = rows.host.slice_of(row)
        if rows.host.slots[row] < 0:
            continue
        start = rows.host.context_lens[row]
        stop = start + span.stop - span.start
        at = span.start
        for run in page_runs(rows.pages_of(row, stop), rows.page_tokens, start, stop):
            part = slice(at, at + run.stop - run.start)
            context.k[:, run] = k_new[part].transpose(0, 1)
            context.v[:, run] = v_new[part].transpose(0, 1)
            at = part.stop


def _tiles(context: PagedKeyValues, rows: Rows, row: int) -> Iterator[tuple[Tensor, Tensor]]:
    """K and V of a row's context in tiles [nkv, n, hd]: views, or copies of scattered pages."""
    context_len = rows.host.context_lens[row]
    pages = rows.pages_of(row)
    for start in range(0, context_len, _TILE):
        runs = page_runs(pages, rows.page_tokens, start, min(start + _TILE, context_len))
        if len(runs) == 1:
            yield context.k[:, runs[0]], context.v[:, runs[0]]
        else:
            yield (
                torch.cat([context.k[:, run] for run in runs], dim=1),
                torch.cat([context.v[:, run] for run in runs], dim=1),
            )


def _attend(
    q: Tensor,
    tiles: Iterator[tuple[Tensor, Tensor]],
    k_new: Tensor,
    v_new: Tensor,
    causal: bool,
) -> Tensor:
    """Attention of one row: q [L, nq, hd], k_new and v_new [nkv, L, hd] -> [L, nq * hd]."""
    length, heads, head_dim = q.shape
    kv_heads = k_new.shape[0]
    per_kv = heads // kv_heads
    folded = q.reshape(length, kv_heads, per_kv, head_dim).permute(1, 2, 0, 3)
    folded = folded.reshape(kv_heads, per_kv * length, head_dim) / math.sqrt(head_dim)
    running: _Softmax | None = None
    for k, v in tiles:
        running = _absorb(running, folded, k, v, None)
    future = None
    if causal and length > 1:
        future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu_(1)
        future = future.repeat(per_kv, 1)
    running = _absorb(running, folded, k_new, v_new, future)
    _, total, output = running
    out = (output / total).to(q.dtype)
    out = out.view(kv_heads, per_kv, length, head_dim).permute(2, 0, 1, 3)
    return out.reshape(length, heads * head_dim)


def _absorb(
    running: _Softmax | None, q: Tensor, k: Tensor, v: Tensor, future: Tensor | None
) -> _Softmax:
    """Continues the softmax of q [nkv, R, hd] by a tile of keys, k and v [nkv, n, hd]; scores
    where `future` [R, n] is True count as -inf."""
    scores = torch.bmm(q, k.transpose(1, 2)).float()
    if future is not None:
        scores.masked_fill_(future, float("-inf"))
    maximum = scores.amax(-1, keepdim=True)
    if running is not None:
        maximum = torch.maximum(maximum, running[0])
    weights = torch.exp(scores.sub_(maximum))
    total = weights.sum(-1, keepdim=True)
    output = torch.bmm(weights.to(v.dtype), v).float()
    if running is not None:
        old_maximum, old_total, old_output = running
        shrink = torch.exp(old_maximum - maximum)
        total = total + old_total * shrink
        output = output + old_output * shrink
    return maximum, total, output
