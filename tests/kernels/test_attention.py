"""Attention over a context and new tokens, against an explicit softmax in fp64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.support.comparing import assert_relative_rms, assert_same_bits, normal
from twotower.kernels.attention import _TILE as TILE
from twotower.kernels.attention import PagedKeyValues, _tile, store_kv
from twotower.kernels.attention import attention as paged_attention
from twotower.kernels.rows import Rows, page_runs

PAGE = 64
# A page that no pool here has: a table's entries behind a row's pages must not be read.
NOWHERE = 10**6

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def make(length: int, context: int, heads: int, kv_heads: int, width: int) -> Inputs:
    return (
        normal(length, heads, width),
        normal(kv_heads, context, width, seed=1),
        normal(kv_heads, context, width, seed=2),
        normal(length, kv_heads, width, seed=3),
        normal(length, kv_heads, width, seed=4),
    )


def attention(
    q: Tensor, k_ctx: Tensor, v_ctx: Tensor, k_new: Tensor, v_new: Tensor, causal: bool
) -> Tensor:
    """The operator on a context in neighbouring pages, the last with room behind it."""
    length = k_ctx.shape[1]
    pages = range(-(-length // PAGE))
    k, v = (in_pool(part, list(pages), len(pages)) for part in (k_ctx, v_ctx))
    rows = rows_of([q.shape[0]], [0], [length], [pages])
    return paged_attention(q, k_new, v_new, PagedKeyValues(k, v), rows, causal)


def rows_of(
    lengths: Sequence[int],
    slots: Sequence[int],
    context_lens: Sequence[int],
    pages: Sequence[Sequence[int]],
    page_tokens: int = PAGE,
) -> Rows:
    """Rows of a pass, with the pages of each slot."""
    widest = max(map(len, pages)) + 1
    table = torch.tensor([[*own, *[NOWHERE] * (widest - len(own))] for own in pages])
    return Rows.build(lengths, slots, context_lens, table.int(), page_tokens)


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
    keys = torch.cat((k_ctx, k_new.transpose(0, 1)), dim=1).double()
    values = torch.cat((v_ctx, v_new.transpose(0, 1)), dim=1).double()
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


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "context"), [(64, 5), (65, 0), (130, 70), (200, TILE + 3)])
def test_pieces_of_more_tokens_than_are_computed_at_once(
    length: int, context: int, causal: bool
) -> None:
    inputs = make(length, context, 4, 2, 8)
    assert_relative_rms(attention(*inputs, causal), true_attention(*inputs, causal), 1e-6)


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
    k_new[4:], v_new[4:] = 7.0, -7.0
    after = attention(q, k_ctx, v_ctx, k_new, v_new, True)
    assert_same_bits(after[:4], before[:4])
    assert not torch.equal(after[4:], before[4:])


def test_a_block_sees_itself_in_both_directions() -> None:
    q, k_ctx, v_ctx, k_new, v_new = make(6, 9, 4, 2, 8)
    before = attention(q, k_ctx, v_ctx, k_new, v_new, False)
    v_new[5] += 1.0
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
        rows = rows_of([4], [0], [length], [pages])
        got = paged_attention(q, k_new, v_new, PagedKeyValues(k, v), rows, causal)
        assert_same_bits(got, want, pages)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 1024, 2050])
def test_pages_give_the_bits_of_the_whole_context_in_one_piece(length: int) -> None:
    """One page as long as the context is a plain tensor of K/V."""
    q, k_ctx, v_ctx, k_new, v_new = make(4, length, 4, 2, 8)
    whole = rows_of([4], [0], [length], [[0]], length)
    want = paged_attention(q, k_new, v_new, PagedKeyValues(k_ctx, v_ctx), whole, True)
    assert_same_bits(attention(q, k_ctx, v_ctx, k_new, v_new, True), want)


def test_neighbouring_pages_are_read_in_place() -> None:
    """A tile is a view where its pages are neighbours, whatever the other tiles are."""
    k, v = normal(2, 40 * PAGE, 4), normal(2, 40 * PAGE, 4, seed=1)
    in_order, scattered = list(range(20, 36)), [3, 1, 2, *range(5, 18)]
    length = TILE + 3 * PAGE + 6
    for pages, in_place in (([*in_order, 0, 1, 2, 3], True), ([*scattered, 0, 1, 2, 3], False)):
        context, rows = PagedKeyValues(k, v), rows_of([1], [0], [length], [pages])
        first = _tile(context, rows, 0, 0, TILE)
        second = _tile(context, rows, 0, TILE, length)
        for pool, own, later in zip((k, v), first, second, strict=True):
            assert (own.data_ptr() == pool[:, pages[0] * PAGE :].data_ptr()) is in_place
            assert_same_bits(own, torch.cat([page_of(pool, page) for page in pages[:16]], dim=1))
            assert later.data_ptr() == pool.data_ptr()
            assert_same_bits(later, pool[:, : length - TILE])


def page_of(pool: Tensor, page: int) -> Tensor:
    return pool[:, page * PAGE : (page + 1) * PAGE]


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


LENGTHS, SLOTS, VISIBLE = [3, 3, 1, 7, 2], [2, 0, 4, 1, 3], [70, 0, 1, 130, 64]
SLOT_PAGES = [[5], [9, 2, 3], [7, 0], [1, 6], [8]]


def ragged(count: int = 10) -> tuple[Tensor, Tensor, Tensor, PagedKeyValues]:
    """q, k_new and v_new of the five rows, and a pool of `count` pages."""
    tokens = sum(LENGTHS)
    pool = PagedKeyValues(normal(2, count * PAGE, 8, seed=5), normal(2, count * PAGE, 8, seed=6))
    return normal(tokens, 6, 8), normal(tokens, 2, 8, seed=7), normal(tokens, 2, 8, seed=8), pool


@pytest.mark.parametrize("causal", [False, True])
def test_rows_of_different_lengths_and_contexts(causal: bool) -> None:
    """Against each row's own K/V gathered by hand, and bit by bit against the row alone."""
    q, k_new, v_new, pool = ragged()
    rows = rows_of(LENGTHS, SLOTS, VISIBLE, SLOT_PAGES)
    got = paged_attention(q, k_new, v_new, pool, rows, causal)
    assert got.shape == (sum(LENGTHS), 6 * 8)
    for row, (length, slot, seen) in enumerate(zip(LENGTHS, SLOTS, VISIBLE, strict=True)):
        own = rows.host.slice_of(row)
        k_ctx, v_ctx = (
            torch.cat([page_of(part, page) for page in SLOT_PAGES[slot]], dim=1)[:, :seen]
            for part in (pool.k, pool.v)
        )
        want = true_attention(q[own], k_ctx, v_ctx, k_new[own], v_new[own], causal)
        assert_relative_rms(got[own], want, 1e-6)
        one = rows_of([length], [slot], [seen], SLOT_PAGES)
        alone = paged_attention(q[own], k_new[own], v_new[own], pool, one, causal)
        assert_same_bits(got[own], alone, row)


@pytest.mark.parametrize("padding", [[0], [2, 3], [4], [0, 1, 2, 3, 4]])
def test_padding_is_not_computed_and_harms_no_row(padding: list[int]) -> None:
    q, k_new, v_new, pool = ragged()
    rows = rows_of(LENGTHS, SLOTS, VISIBLE, SLOT_PAGES)
    want = paged_attention(q, k_new, v_new, pool, rows, False)
    slots = [-1 if row in padding else slot for row, slot in enumerate(SLOTS)]
    for row in padding:
        own = rows.host.slice_of(row)
        for part in (q, k_new, v_new):
            part[own] = float("nan")
    # The last slot's pages are not to be had: padding does not stand for it.
    padded = rows_of(LENGTHS, slots, VISIBLE, [*SLOT_PAGES, [NOWHERE] * 3])
    got = paged_attention(q, k_new, v_new, pool, padded, False)
    assert got.shape == want.shape
    for row in set(range(len(LENGTHS))) - set(padding):
        assert_same_bits(got[rows.host.slice_of(row)], want[rows.host.slice_of(row)], row)


def test_new_kv_is_written_behind_the_visible_tokens_and_nowhere_else() -> None:
    """Across scattered pages; what a pool held elsewhere stays, padding is not written."""
    _, k_new, v_new, pool = ragged(20)
    # The rows of 3, 7 and 2 new tokens cross into a page that stands elsewhere.
    slots, context_lens = [2, 0, -1, 1, 3], [62, 10, 3, 124, 63]
    before = pool.k.clone(), pool.v.clone()
    written = torch.zeros(20 * PAGE, dtype=torch.bool)
    want = [part.clone() for part in before]
    rows = rows_of(LENGTHS, slots, context_lens, SLOT_PAGES)
    for row, (slot, seen) in enumerate(zip(slots, context_lens, strict=True)):
        own = rows.host.slice_of(row)
        for offset, token in enumerate(range(own.start, own.stop)):
            if slot >= 0:
                page, place = divmod(seen + offset, PAGE)
                target = SLOT_PAGES[slot][page] * PAGE + place
                assert not written[target]
                written[target] = True
                want[0][:, target], want[1][:, target] = k_new[token], v_new[token]
    assert int(written.sum()) == sum(LENGTHS) - 1
    store_kv(k_new, v_new, pool, rows)
    assert_same_bits(pool.k, want[0])
    assert_same_bits(pool.v, want[1])
    assert not torch.equal(pool.k, before[0])


def test_what_was_stored_is_seen_as_context() -> None:
    """A token after the block sees it there as it saw it beside itself."""
    q, k_new, v_new, pool = ragged()
    first, second = rows_of([3], [2], [62], SLOT_PAGES), rows_of([1], [2], [65], SLOT_PAGES)
    together = rows_of([4], [2], [62], SLOT_PAGES)
    want = paged_attention(q[:4], k_new[:4], v_new[:4], pool, together, True)
    store_kv(k_new[:3], v_new[:3], pool, first)
    got = paged_attention(q[3:4], k_new[3:4], v_new[3:4], pool, second, True)
    assert_relative_rms(got, want[3:], 1e-6)


def test_bf16_kv_is_stored_as_it_is() -> None:
    _, k_new, v_new, wide = ragged()
    pool = PagedKeyValues(wide.k.bfloat16(), wide.v.bfloat16())
    store_kv(k_new[:3].bfloat16(), v_new[:3].bfloat16(), pool, rows_of([3], [1], [0], SLOT_PAGES))
    assert_same_bits(pool.k[:, 9 * PAGE : 9 * PAGE + 3], k_new[:3].bfloat16().transpose(0, 1))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 3, 16, 80])
def test_rows_of_one_length_share_operations_and_keep_their_bits(length: int, causal: bool) -> None:
    """Rows of many contexts, none and more than a tile among them; K/V in pages that take turns."""
    seen = [0, 1, 63, 64, 100, 129, 300, 511, 640, TILE + 70]
    count, width = len(seen), 48
    pages = [list(range(row, 18 * count, count)) for row in range(count)]
    pool = PagedKeyValues(
        normal(2, 18 * count * PAGE, width, seed=5), normal(2, 18 * count * PAGE, width, seed=6)
    )
    tokens = count * length
    q = normal(tokens, 6, width)
    k_new, v_new = normal(tokens, 2, width, seed=7), normal(tokens, 2, width, seed=8)
    slots = list(range(count))
    rows = rows_of([length] * count, slots, seen, pages)
    got = paged_attention(q, k_new, v_new, pool, rows, causal)
    for row in slots:
        own = rows.host.slice_of(row)
        one = rows_of([length], [row], [seen[row]], pages)
        alone = paged_attention(q[own], k_new[own], v_new[own], pool, one, causal)
        assert_same_bits(got[own], alone, row)
