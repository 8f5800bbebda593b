"""Attention of new tokens over a context's K/V and their own, without positions.

    o = softmax(q [K_ctx | K_new]^T / sqrt(hd)) [V_ctx | V_new]

A block of the denoiser sees the whole context and the whole block (bidirectional); prefill and
extension see the whole context and, among the new tokens, those up to their own (causal). Query
head j uses KV head j // (nq / nkv), so all query heads of a KV head are folded into its rows and
K/V are read in place, once. Keys are walked in tiles of a fixed size with a running maximum:
memory does not grow with the context, and a row's result depends on its own length only. The
context's K/V stand in pages; a tile whose pages are neighbours is read in place.
Source: Milakov and Gimelshein 2018; Dao et al. 2022 (FlashAttention), section 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_TILE = 1024


@dataclass(frozen=True, slots=True)
class KeyValuePages:
    """One layer's K/V of a context of `length` tokens, inside a pool.

    `k` and `v` [nkv, T, hd] are the pool's. Token i stands in page `pages[i // page_tokens]`, and
    page p begins at token p * page_tokens of the pool; later pages are room and are not read.
    """

    k: Tensor
    v: Tensor
    pages: Sequence[int]
    page_tokens: int
    length: int

    def tile(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """K and V of tokens start..stop-1, [nkv, n, hd]: views, or copies of scattered pages."""
        runs = page_runs(self.pages, self.page_tokens, start, stop)
        if len(runs) == 1:
            return self.k[:, runs[0]], self.v[:, runs[0]]
        return (
            torch.cat([self.k[:, run] for run in runs], dim=1),
            torch.cat([self.v[:, run] for run in runs], dim=1),
        )


def page_runs(pages: Sequence[int], page_tokens: int, start: int, stop: int) -> list[slice]:
    """Where tokens start..stop-1 stand in a pool, as runs of neighbouring pages."""
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
    q: Tensor, context: KeyValuePages, k_new: Tensor, v_new: Tensor, causal: bool
) -> Tensor:
    """q [L, nq, hd], k_new and v_new [nkv, L, hd] -> [L, nq * hd] in q's dtype; softmax in fp32."""
    length, heads, width = q.shape
    kv_heads = k_new.shape[0]
    per_kv = heads // kv_heads
    folded = q.view(length, kv_heads, per_kv, width).permute(1, 2, 0, 3)
    folded = folded.reshape(kv_heads, per_kv * length, width) / math.sqrt(width)
    running: _Running | None = None
    for start in range(0, context.length, _TILE):
        k, v = context.tile(start, min(start + _TILE, context.length))
        running = _absorb(running, folded, k, v, None)
    future = None
    if causal and length > 1:
        future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu_(1)
        future = future.repeat(per_kv, 1)
    running = _absorb(running, folded, k_new, v_new, future)
    out = (running.output / running.total).to(q.dtype)
    out = out.view(kv_heads, per_kv, length, width).permute(2, 0, 1, 3)
    return out.reshape(length, heads * width)


@dataclass
class _Running:
    """A softmax in progress: maximum and total [nkv, R, 1], weighted values [nkv, R, hd]."""

    maximum: Tensor
    total: Tensor
    output: Tensor


def _absorb(
    running: _Running | None, q: Tensor, k: Tensor, v: Tensor, future: Tensor | None
) -> _Running:
    scores = torch.bmm(q, k.transpose(1, 2)).float()
    if future is not None:
        scores.masked_fill_(future, float("-inf"))
    maximum = scores.amax(-1, keepdim=True)
    if running is not None:
        maximum = torch.maximum(maximum, running.maximum)
    weights = torch.exp(scores.sub_(maximum))
    total = weights.sum(-1, keepdim=True)
    output = torch.bmm(weights.to(v.dtype), v).float()
    if running is not None:
        shrink = torch.exp(running.maximum - maximum)
        total = total + running.total * shrink
        output = output + running.output * shrink
    return _Running(maximum, total, output)
