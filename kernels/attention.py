"""Attention of new tokens over a context's K/V and their own, without positions.

    o = softmax(q [K_ctx | K_new]^T / sqrt(hd)) [V_ctx | V_new]

A block of the denoiser sees the whole context and the whole block (bidirectional); prefill and
extension see the whole context and, among the new tokens, those up to their own (causal). Query
head j uses KV head j // (nq / nkv), so all query heads of a KV head are folded into its rows and
K/V are read in place, once. Keys are walked in tiles of a fixed size with a running maximum:
memory does not grow with the context, and a row's result depends on its own length only.
Source: Milakov and Gimelshein 2018; Dao et al. 2022 (FlashAttention), section 3.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_TILE = 1024


def attention(
    q: Tensor, k_ctx: Tensor, v_ctx: Tensor, k_new: Tensor, v_new: Tensor, causal: bool
) -> Tensor:
    """q [L, nq, hd], k_ctx and v_ctx [nkv, S, hd] (S may be 0), k_new and v_new [nkv, L, hd]
    -> [L, nq * hd] in q's dtype; softmax in fp32."""
    length, heads, width = q.shape
    kv_heads = k_ctx.shape[0]
    per_kv = heads // kv_heads
    folded = q.view(length, kv_heads, per_kv, width).permute(1, 2, 0, 3)
    folded = folded.reshape(kv_heads, per_kv * length, width) / math.sqrt(width)
    running: _Running | None = None
    for start in range(0, k_ctx.shape[1], _TILE):
        tile = slice(start, start + _TILE)
        running = _absorb(running, folded, k_ctx[:, tile], v_ctx[:, tile], None)
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
