"""Attention over a context and new tokens, against an explicit softmax in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.comparing import assert_relative_rms, assert_same_bits, normal
from twotower.kernels.attention import KeyValuePages, page_runs
from twotower.kernels.attention import attention as paged_attention

TILE = 1024
PAGE = 64

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def make(length: int, context: int, heads: int, kv_heads: int, width: int) -> Inputs:
    return (
        normal(length, heads, width),
        normal(kv_heads, context, width, seed=1),
        normal(kv_heads, context, width, seed=2),
        normal(kv_heads, length, width, seed=3),
        normal(kv_heads, length, width, seed=4),
    )


def attention(
    q: Tensor, k_ctx: Tensor, v_ctx: Tensor, k_new: Tensor, v_new: Tensor, causal: bool
) -> Tensor:
    """The operator on a context in neighbouring pages, the last with room behind it."""
    length = k_ctx.shape[1]
    pages = range(-(-length // PAGE))
    k, v = (in_pool(part, list(pages), len(pages)) for part in (k_ctx, v_ctx))
    return paged_attention(q, KeyValuePages(k, v, pages, PAGE, length), k_new, v_new, causal)


def in_pool(rows: Tensor, pages: list[int], num_pages: int) -> Tensor:
    """A pool of NaN with one row's K or V [nkv, S, hd] in its pages."""
    pool = torch.full((rows.shape[0], num_pages * PAGE, rows.shape[2]), float("nan"))
    pool = pool.to(rows.dtype)
    for number, page in enumerate(pages):
        part = rows[:, number * PAGE : (number + 1) * PAGE]
        pool[:, page * PAGE : page * PAGE + part.shape[1]] = part
    return pool


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


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 1023, 1024, 1025, 2050])
@pytest.mark.parametrize("causal", [False, True])
def test_the_places_of_the_pages_do_not_matter(length: int, causal: bool) -> None:
    """Bit by bit: neighbours, any order, and two rows whose pages take turns."""
    q, k_ctx, v_ctx, k_new, v_new = make(4, length, 4, 2, 8)
    want = attention(q, k_ctx, v_ctx, k_new, v_new, causal)
    count = -(-length // PAGE)
    shuffled = torch.randperm(2 * count, generator=torch.Generator().manual_seed(0)).tolist()
    orders = [
        list(range(5, 5 + count)),
        list(range(count))[::-1],
        list(range(0, 2 * count, 2)),
        shuffled[:count],
        # One page away from its neighbours, in the second tile where there is one.
        [page + (page >= min(17, count - 1)) for page in range(count)],
    ]
    for pages in orders:
        k, v = (in_pool(part, pages, 2 * count + 5) for part in (k_ctx, v_ctx))
        context = KeyValuePages(k, v, pages, PAGE, length)
        got = paged_attention(q, context, k_new, v_new, causal)
        assert_same_bits(got, want, pages)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 1024, 2050])
def test_pages_give_the_bits_of_the_whole_context_in_one_piece(length: int) -> None:
    """One page as long as the context is a plain tensor of K/V."""
    q, k_ctx, v_ctx, k_new, v_new = make(4, length, 4, 2, 8)
    whole = KeyValuePages(k_ctx, v_ctx, [0], length, length)
    want = paged_attention(q, whole, k_new, v_new, True)
    assert_same_bits(attention(q, k_ctx, v_ctx, k_new, v_new, True), want)


def test_neighbouring_pages_are_read_in_place() -> None:
    pool = normal(2, 5 * PAGE, 4)
    context = KeyValuePages(pool, pool, [3, 1, 2, 0], PAGE, 200)
    k, _ = context.tile(70, 180)
    assert k.data_ptr() == pool[:, PAGE + 6 :].data_ptr()
    assert_same_bits(k, pool[:, PAGE + 6 : PAGE + 116])


@pytest.mark.parametrize(
    ("start", "stop", "runs"),
    [
        (0, 0, []),
        (0, 4, [(12, 16)]),
        (1, 7, [(13, 16), (4, 7)]),
        (4, 12, [(4, 12)]),
        (5, 14, [(5, 12), (0, 2)]),
        (0, 16, [(12, 16), (4, 12), (0, 4)]),
        (15, 16, [(3, 4)]),
    ],
)
def test_runs_of_neighbouring_pages(start: int, stop: int, runs: list[tuple[int, int]]) -> None:
    assert page_runs([3, 1, 2, 0], 4, start, stop) == [slice(*run) for run in runs]


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
