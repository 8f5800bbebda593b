"""Attention over a context and new tokens, against an explicit softmax in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.comparing import assert_relative_rms, assert_same_bits, normal
from twotower.kernels.attention import attention

TILE = 1024


Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def make(length: int, context: int, heads: int, kv_heads: int, width: int) -> Inputs:
    return (
        normal(length, heads, width),
        normal(kv_heads, context, width, seed=1),
        normal(kv_heads, context, width, seed=2),
        normal(kv_heads, length, width, seed=3),
        normal(kv_heads, length, width, seed=4),
    )


def true_attention(
    q: Tensor, k_ctx: Tensor, v_ctx: Tensor, k_new: Tensor, v_new: Tensor, causal: bool
) -> Tensor:
    length, heads, width = q.shape
    keys = torch.cat((k_ctx, k_new), dim=1).double()
    values = torch.cat((v_ctx, v_new), dim=1).double()
    per_kv = heads // keys.shape[0]
    out = torch.zeros(length, heads, width, dtype=torch.float64)
    for t in range(length):
        seen = k_ctx.shape[1] + (t + 1 if causal else length)
        for head in range(heads):
            own = keys[head // per_kv, :seen]
            weights = torch.softmax(own @ q[t, head].double() / width**0.5, dim=0)
            out[t, head] = weights @ values[head // per_kv, :seen]
    return out.reshape(length, heads * width)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 2, 7, 16])
@pytest.mark.parametrize("context", [0, 1, 5, 63])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 1), (3, 3)])
def test_values(causal: bool, length: int, context: int, heads: int, kv_heads: int) -> None:
    inputs = make(length, context, heads, kv_heads, 8)
    want = true_attention(*inputs, causal)
    got = attention(*inputs, causal)
    assert_relative_rms(got, want, 1e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("context", [TILE - 1, TILE, TILE + 1, 2 * TILE + 452])
def test_contexts_around_and_beyond_a_tile(causal: bool, context: int) -> None:
    q, k_ctx, v_ctx, k_new, v_new = make(3, context, 4, 2, 8)
    # One loud key in the last tile: the running maximum has to move there.
    k_ctx[:, -2] *= 6.0
    want = true_attention(q, k_ctx, v_ctx, k_new, v_new, causal)
    assert_relative_rms(attention(q, k_ctx, v_ctx, k_new, v_new, causal), want, 1e-6)


@pytest.mark.parametrize("scale", [30.0, 1e3])
def test_large_scores_do_not_overflow(scale: float) -> None:
    q, k_ctx, v_ctx, k_new, v_new = make(5, TILE + 40, 4, 2, 8)
    want = true_attention(q * scale, k_ctx, v_ctx, k_new, v_new, False)
    got = attention(q * scale, k_ctx, v_ctx, k_new, v_new, False)
    assert bool(torch.isfinite(got).all())
    assert_relative_rms(got, want, 1e-3)


def test_a_causal_token_does_not_see_those_after_it() -> None:
    q, k_ctx, v_ctx, k_new, v_new = make(6, 9, 4, 2, 8)
    before = attention(q, k_ctx, v_ctx, k_new, v_new, True)
    k_new[:, 4:], v_new[:, 4:] = 7.0, -7.0
    after = attention(q, k_ctx, v_ctx, k_new, v_new, True)
    assert_same_bits(after[:4], before[:4])
    assert not torch.equal(after[4:], before[4:])


def test_a_block_sees_itself_in_both_directions() -> None:
    q, k_ctx, v_ctx, k_new, v_new = make(6, 9, 4, 2, 8)
    before = attention(q, k_ctx, v_ctx, k_new, v_new, False)
    v_new[:, 5] += 1.0
    assert bool((attention(q, k_ctx, v_ctx, k_new, v_new, False) != before).any(1).all())


def test_the_order_of_the_context_does_not_matter() -> None:
    """There are no positions: K/V of a context may lie in any order."""
    q, k_ctx, v_ctx, k_new, v_new = make(4, 50, 4, 2, 8)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    got = attention(q, k_ctx[:, order], v_ctx[:, order], k_new, v_new, False)
    assert_relative_rms(got, attention(q, k_ctx, v_ctx, k_new, v_new, False), 1e-6)


@pytest.mark.parametrize("capacity", [70, 64, 5000])
def test_the_room_behind_the_context_does_not_matter(capacity: int) -> None:
    q, k_ctx, v_ctx, k_new, v_new = make(4, 63, 4, 2, 8)
    room = torch.full((2, 2, capacity, 8), float("nan"))
    room[0, :, :63], room[1, :, :63] = k_ctx, v_ctx
    got = attention(q, room[0, :, :63], room[1, :, :63], k_new, v_new, False)
    assert_same_bits(got, attention(q, k_ctx, v_ctx, k_new, v_new, False))


def test_strided_queries() -> None:
    q, k_ctx, v_ctx, k_new, v_new = make(4, 20, 4, 2, 8)
    wide = torch.cat((q, q), dim=1)
    got = attention(wide[:, :4], k_ctx, v_ctx, k_new, v_new, True)
    assert_same_bits(got, attention(q, k_ctx, v_ctx, k_new, v_new, True))


def test_bf16_keeps_its_dtype() -> None:
    q, k_ctx, v_ctx, k_new, v_new = (part.bfloat16() for part in make(4, 20, 4, 2, 8))
    got = attention(q, k_ctx, v_ctx, k_new, v_new, True)
    assert got.dtype == torch.bfloat16
    assert_relative_rms(got, true_attention(q, k_ctx, v_ctx, k_new, v_new, True), 1e-2)
