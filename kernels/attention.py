"""Attention of new tokens over a context's K/V and the new K/V, without position encodings.

    o = softmax(q [K_ctx | K_new]^T / sqrt(hd)) [V_ctx | V_new]

Tokens of a denoiser block attend to the whole context and the whole block (bidirectional); those of
a prefill or an extension attend to the whole context and to new tokens up to themselves (causal).
Query head j uses KV head j // (nq / nkv), so all query heads of a KV head are folded into its rows
and K/V are read in place, once. Keys are walked in tiles of a fixed size, the new ones beside the
last, with a running maximum: memory does not grow with the context, and a row's result depends on
no other row. The context's K/V are in pages; a tile whose pages are neighbours is read in place.
Source: Milakov and Gimelshein 2018; Dao et al. 2022 (FlashAttention), section 3.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.kernels.rows import Rows, Run

# A softmax in progress: maximum and total [nkv, R, 1], weighted values [nkv, R, hd], fp32.
_Softmax = tuple[Tensor, Tensor, Tensor]

_TILE = 1024
# Tokens of a row whose scores are computed at once, so that they stay in a core's cache.
_QUERY_TOKENS = 64
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


def attention(
    q: Tensor, k_new: Tensor, v_new: Tensor, context: PagedKeyValues, rows: Rows, causal: bool
) -> Tensor:
    """q [T, nq, hd], k_new and v_new [T, nkv, hd] -> [T, nq * hd] in q's dtype; softmax in fp32.

    A row's tokens attend to the first context_lens[row] tokens of its context and to its new
    tokens, if `causal` up to themselves. Padding gives zeros.
    """
    runs = rows.host.runs
    if q.dtype != torch.float32:
        # Only fp32 is known to have a row's bits when rows share an operation.
        runs = tuple(each for run in runs for each in run.singles())
    if len(runs) == 1 and runs[0].count == rows.count:
        return _attend(q, k_new, v_new, context, rows, runs[0], causal)
    out = q.new_zeros(q.shape[0], q.shape[1] * q.shape[2])
    for run in runs:
        attended = _attend(q, k_new, v_new, context, rows, run, causal)
        out[run.token : run.token + len(attended)] = attended
    return out


def store_kv(k_new: Tensor, v_new: Tensor, context: PagedKeyValues, rows: Rows) -> None:
    """Writes k_new and v_new [T, nkv, hd] into the pool: each row's new tokens follow the
    context_lens[row] tokens that it has."""
    places = rows.new_places
    if rows.real_tokens is not None:
        k_new, v_new = k_new[rows.real_tokens], v_new[rows.real_tokens]
    context.k.index_copy_(1, places, k_new.transpose(0, 1))
    context.v.index_copy_(1, places, v_new.transpose(0, 1))


def _attend(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    context: PagedKeyValues,
    rows: Rows,
    run: Run,
    causal: bool,
) -> Tensor:
    """Attention of a run of rows of one length, [count * length, nq * hd]."""
    queries = run.take(q)
    keys, values = (run.take(part).transpose(1, 2) for part in (k_new, v_new))
    if run.length <= _QUERY_TOKENS:
        out = _attend_block(queries, keys, values, context, rows, run, causal)
        return out.reshape(run.count * run.length, -1)
    blocks = []
    for start in range(0, run.length, _QUERY_TOKENS):
        stop = min(start + _QUERY_TOKENS, run.length)
        seen = stop if causal else run.length
        own = keys[:, :, :seen], values[:, :, :seen]
        blocks.append(_attend_block(queries[:, start:stop], *own, context, rows, run, causal))
    return torch.cat(blocks, dim=1).reshape(run.count * run.length, -1)


def _attend_block(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    context: PagedKeyValues,
    rows: Rows,
    run: Run,
    causal: bool,
) -> Tensor:
    """Attention of some tokens of each row of a run, queries [B, l, nq, hd], to its context and to
    new keys and values [B, nkv, n, hd], of which a `causal` one sees all but those that follow it
    among the last l -> [B, l, nkv, nq / nkv, hd]."""
    (length, kv_heads), seen = (queries.shape[1], keys.shape[1]), keys.shape[2]
    folded = _folded(queries, kv_heads)
    scores = torch.bmm(folded.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2))
    if causal and length > 1:
        future = torch.ones(length, seen, dtype=torch.bool, device=keys.device)
        future = future.triu_(seen - length + 1)
        scores.view(-1, length, seen).masked_fill_(future, float("-inf"))
    parts = zip(run.rows, folded, scores.unflatten(0, (-1, kv_heads)), values, strict=True)
    attended = [_attend_row(context, rows, *part) for part in parts]
    out = attended[0].unsqueeze(0) if len(attended) == 1 else torch.stack(attended)
    by_head: Tensor = out.unflatten(2, (-1, length)).permute(0, 3, 1, 2, 4)
    return by_head.to(queries.dtype)


def _folded(queries: Tensor, kv_heads: int) -> Tensor:
    """queries [B, L, nq, hd] -> [B, nkv, R, hd] over sqrt(hd), the queries of a KV head's query
    heads one after another."""
    by_head: Tensor = queries.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)
    folded = by_head.reshape(len(queries), kv_heads, -1, queries.shape[-1])
    return folded / math.sqrt(queries.shape[-1])


def _attend_row(
    context: PagedKeyValues, rows: Rows, row: int, q: Tensor, new_scores: Tensor, v_new: Tensor
) -> Tensor:
    """Attention of one row: q [nkv, R, hd], scores of the new keys [nkv, R, L] and their values
    [nkv, L, hd] -> [nkv, R, hd]."""
    context_len = rows.host.context_lens[row]
    if not context_len:
        return torch.bmm(_softmax(new_scores, v_new.dtype), v_new)
    running, last = None, (context_len - 1) // _TILE * _TILE
    for start in range(0, last, _TILE):
        k, v = _tile(context, rows, row, start, start + _TILE)
        running = _absorb(running, torch.bmm(q, k.transpose(1, 2)), v, None)
    k, v = _tile(context, rows, row, last, context_len)
    scores = torch.cat((torch.bmm(q, k.transpose(1, 2)), new_scores), dim=-1)
    if running is None:
        return _weighted(_softmax(scores, v.dtype), v, v_new)
    _, total, output = _absorb(running, scores, v, v_new)
    return output / total


def _tile(
    context: PagedKeyValues, rows: Rows, row: int, start: int, stop: int
) -> tuple[Tensor, Tensor]:
    """K and V of a row's context tokens start..stop-1, [nkv, n, hd]: views, or copies of scattered
    pages."""
    runs = rows.runs_of(row, start, stop)
    if len(runs) == 1:
        return context.k[:, runs[0]], context.v[:, runs[0]]
    return (
        torch.cat([context.k[:, run] for run in runs], dim=1),
        torch.cat([context.v[:, run] for run in runs], dim=1),
    )


def _absorb(running: _Softmax | None, scores: Tensor, v: Tensor, v_new: Tensor | None) -> _Softmax:
    """Continues a softmax by scores [nkv, R, n] of keys whose values are v, followed by v_new."""
    scores = scores.float()
    maximum = scores.amax(-1, keepdim=True)
    if running is not None:
        maximum = torch.maximum(maximum, running[0])
    weights = torch.exp(scores.sub_(maximum))
    total = weights.sum(-1, keepdim=True)
    output = _weighted(weights.to(v.dtype), v, v_new).float()
    if running is not None:
        old_maximum, old_total, old_output = running
        shrink = torch.exp(old_maximum - maximum)
        total = total + old_total * shrink
        output = output + old_output * shrink
    return maximum, total, output


def _softmax(scores: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(dtype)


def _weighted(weights: Tensor, v: Tensor, v_new: Tensor | None) -> Tensor:
    """weights [nkv, R, n] of the values v, followed by v_new -> their sums [nkv, R, hd]."""
    if v_new is None:
        return torch.bmm(weights, v)
    seen = v.shape[1]
    return torch.baddbmm(torch.bmm(weights[..., :seen], v), weights[..., seen:], v_new)
