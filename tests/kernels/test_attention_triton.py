"""The attention kernel and the one that stores K/V, against an explicit softmax in fp64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from tests.support.comparing import assert_relative_rms, assert_same_bits, normal
from tests.support.hopper import Launch, compile_all
from twotower.kernels import attention as reference
from twotower.kernels.attention import PagedKeyValues
from twotower.kernels.attention_triton import SHORT_TOKENS, attention, store_kv
from twotower.kernels.rows import Rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAN = float("nan")
# fp32 sums over keys in another order; in fp16 the weights are rounded before their product.
LIMITS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
Heads = tuple[int, int, int]


@pytest.fixture(autouse=True)
def _nan_in_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills new memory with NaN, so that a read of an element that no kernel wrote shows."""
    allocate = torch.empty

    def filled(*args: object, **kwargs: object) -> Tensor:
        tensor: Tensor = allocate(*args, **kwargs)  # type: ignore[call-overload]
        return tensor.fill_(NAN) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", filled)


@dataclass(frozen=True)
class Row:
    """`length` new tokens behind `context_lens` ones; the numbers depend on `seed` and sizes."""

    length: int
    context_lens: int
    seed: int = 0
    padding: bool = False

    def new(self, heads: Heads) -> Tensor:
        """q, k and v side by side, [length, nq + 2 nkv, hd]; NaN for padding."""
        nq, nkv, width = heads
        numbers = normal(self.length, nq + 2 * nkv, width, seed=1000 + self.seed)
        return torch.full_like(numbers, NAN) if self.padding else numbers

    def context(self, heads: Heads) -> tuple[Tensor, Tensor]:
        """K and V of the visible tokens, [nkv, visible, hd]."""
        _, nkv, width = heads
        both = normal(2, nkv, self.context_lens, width, seed=2000 + self.seed)
        return both[0], both[1]


@dataclass(frozen=True)
class Case:
    """Arguments of the operators; pools hold NaN but for the tokens that rows attend to."""

    q: Tensor
    k: Tensor
    v: Tensor
    context: PagedKeyValues
    rows: Rows

    def attention(self, causal: bool) -> Tensor:
        return attention(self.q, self.k, self.v, self.context, self.rows, causal)


def make(
    rows: list[Row],
    heads: Heads = (4, 2, 8),
    page: int = 8,
    dtype: torch.dtype = torch.float32,
    room: int = 0,
    order: int = 0,
    scale: float = 1.0,
) -> Case:
    """Rows in slots and pages of a random order, `room` more pages for each slot."""
    nq, nkv, width = heads
    qkv = torch.cat([row.new(heads) for row in rows])
    qkv[:, :nq] *= scale
    # A projection with other columns on both sides.
    wide = torch.full((len(qkv), nq + 2 * nkv + 2, width), NAN, dtype=dtype, device=DEVICE)
    wide[:, 1:-1] = qkv.to(DEVICE, dtype)
    q, k, v = wide[:, 1:-1].split((nq, nkv, nkv), dim=1)

    generator = torch.Generator().manual_seed(order)
    wanted = max(-(-(row.context_lens + row.length) // page) for row in rows) + room
    slots = torch.randperm(len(rows) + 2, generator=generator)[: len(rows)].tolist()
    table = torch.randperm((len(rows) + 2) * wanted, generator=generator).int()
    table = table.view(len(rows) + 2, wanted)
    pools = torch.full((2, 3, nkv, table.numel() * page, width), NAN)
    for row, slot in zip(rows, slots, strict=True):
        index = torch.arange(row.context_lens)
        places = table[slot].long()[index // page] * page + index % page
        for pool, part in zip(pools, row.context(heads), strict=True):
            pool[1][:, places] = part
    pools = pools.to(DEVICE, dtype)
    slots = [-1 if row.padding else slot for row, slot in zip(rows, slots, strict=True)]
    lengths, context_lens = [row.length for row in rows], [row.context_lens for row in rows]
    return Case(
        q,
        k,
        v,
        PagedKeyValues(pools[0, 1], pools[1, 1]),
        Rows.build(lengths, slots, context_lens, table.to(DEVICE), page),
    )


def truth(case: Case, causal: bool) -> list[Tensor]:
    """Each row's [length, nq * hd] in fp64, from the numbers that the operator gets."""
    outputs = []
    page = case.rows.page_tokens
    table = case.rows.pages.cpu()
    for row, (slot, seen) in enumerate(
        zip(case.rows.host.slots, case.rows.host.context_lens, strict=True)
    ):
        span = case.rows.host.slice_of(row)
        index = torch.arange(seen)
        places = table[slot].long()[index // page] * page + index % page
        q, k, v = (part[span].cpu().double().transpose(0, 1) for part in (case.q, case.k, case.v))
        k = torch.cat((case.context.k.cpu()[:, places].double(), k), dim=1)
        v = torch.cat((case.context.v.cpu()[:, places].double(), v), dim=1)
        per_kv = q.shape[0] // k.shape[0]
        scores = q @ k.repeat_interleave(per_kv, 0).transpose(1, 2) / q.shape[-1] ** 0.5
        if causal:
            later = torch.ones_like(scores[0], dtype=torch.bool).triu(seen + 1)
            scores = scores.masked_fill(later, float("-inf"))
        out = torch.softmax(scores, -1) @ v.repeat_interleave(per_kv, 0)
        outputs.append(out.transpose(0, 1).flatten(1))
    return outputs


def check(case: Case, causal: bool, limit: float | None = None) -> None:
    """Every row by itself, so that a long one does not hide a short one."""
    got = case.attention(causal).cpu()
    for row, want in enumerate(truth(case, causal)):
        own = got[case.rows.host.slice_of(row)]
        if case.rows.host.slots[row] < 0:
            assert bool(own.isnan().all()), "padding was written"
        else:
            assert_relative_rms(own, want, limit or LIMITS[case.q.dtype])


RAGGED = [Row(1, 0, 1), Row(3, 5, 2), Row(2, 9, padding=True), Row(16, 64, 3), Row(7, 33, 4)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("heads", "page", "dtype"),
    [
        ((6, 2, 8), 4, torch.float32),
        ((4, 1, 12), 64, torch.float32),
        ((3, 3, 20), 8, torch.float16),
        ((4, 2, 16), 128, torch.float16),
    ],
)
def test_ragged_rows(causal: bool, heads: Heads, page: int, dtype: torch.dtype) -> None:
    """With padding between them, queries in views, and NaN wherever nothing is to be read."""
    check(make(RAGGED, heads, page, dtype), causal)


@pytest.mark.parametrize("length", [1, 2, 33, 64])
def test_lengths_of_a_block(length: int) -> None:
    check(make([Row(length, 40, 1), Row(1, 3, 2)]), False)


@pytest.mark.parametrize(("page", "causal"), [(64, False), (1024, True)])
def test_contexts_of_several_splits(causal: bool, page: int) -> None:
    """0 .. 1600 tokens are 1 .. 4 splits; a split is no shorter than a page."""
    seen = (512, 513, 1600, 0)
    rows = [Row(3, count, count) for count in seen] + [Row(2, 700, padding=True)]
    check(make(rows, (2, 1, 8), page), causal)


@pytest.mark.parametrize("length", [1, 9])
def test_many_splits(length: int) -> None:
    """As many as there may be for several tokens; for one they are shorter, and 33."""
    check(make([Row(length, 8256, 1)], (4, 1, 8), 64, torch.float16), True)


@pytest.mark.parametrize("causal", [False, True])
def test_long_rows_beside_short_ones(causal: bool) -> None:
    """Two prefills, and a block over a context of two splits."""
    rows = [Row(SHORT_TOKENS + 70, 70, 1), Row(SHORT_TOKENS + 1, 520, 2), Row(16, 600, 3)]
    check(make(rows, (2, 1, 8), 64, torch.float16), causal)


def test_a_loud_key_moves_the_maximum() -> None:
    case = make([Row(4, 700, 1)], (4, 2, 8), 64)
    place = int(case.rows.pages[case.rows.slots[0], 10]) * 64 + 30
    case.context.k[:, place] *= 8.0
    check(case, False, 5e-6)


@pytest.mark.parametrize("scale", [30.0, 1e3])
def test_large_scores_do_not_overflow(scale: float) -> None:
    check(make([Row(5, 600, 1)], (4, 2, 8), 64, scale=scale), False, 1e-3)


@pytest.mark.parametrize(("causal", "dtype"), [(False, torch.float16), (True, torch.float32)])
def test_rows_alone_are_rows_of_a_batch(causal: bool, dtype: torch.dtype) -> None:
    """Bit by bit, whatever the place of the row and its pages, and the size of the table."""
    rows = [
        *(Row(9, 70, 1), Row(12, 600, 2), Row(2, 9, padding=True)),
        *(Row(SHORT_TOKENS + 6, 40, 3), Row(16, 0, 4)),
    ]
    case = make(rows, (2, 1, 8), 64, dtype, room=7, order=1)
    whole = case.attention(causal)
    for number, row in enumerate(rows):
        if not row.padding:
            alone = make([row], (2, 1, 8), 64, dtype, order=2).attention(causal)
            assert_same_bits(whole[case.rows.host.slice_of(number)], alone, row)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_stays_in_its_row() -> None:
    rows = [Row(5, 20, 1), Row(4, 600, 2), Row(7, 30, 3)]
    case = make(rows, page=64)
    want = case.attention(False)
    case.q[5:9] = case.k[5:9] = NAN
    got = case.attention(False)
    assert bool(got[5:9].isnan().all())
    keep = [0, 1, 2, 3, 4, *range(9, 16)]
    assert_same_bits(got[keep], want[keep])


@pytest.mark.parametrize("page", [4, 64])
def test_stored_tokens_are_seen_by_the_next(page: int) -> None:
    """Two passes with the K/V of the first put into pages, and one pass over all."""
    lengths, later = (5, 1, 33), (2, 6, 3)
    rows = [Row(a + b, seen, b) for a, b, seen in zip(lengths, later, (3, 8, 0), strict=True)]
    case = make(rows, page=page)
    host = case.rows.host
    want = case.attention(True)
    cu_seqlens = host.cu_seqlens[:-1]
    early = [range(at, at + a) for at, a in zip(cu_seqlens, lengths, strict=True)]
    late = [range(at + a, at + a + b) for at, a, b in zip(cu_seqlens, lengths, later, strict=True)]
    for parts, done in ((early, (0, 0, 0)), (late, lengths)):
        tokens = [token for part in parts for token in part]
        context_lens = [seen + a for seen, a in zip(host.context_lens, done, strict=True)]
        own = Rows.build(
            [len(part) for part in parts], host.slots, context_lens, case.rows.pages, page
        )
        qkv = [torch.cat([part[[token]] for token in tokens]) for part in (case.q, case.k, case.v)]
        step = Case(*qkv, case.context, own)
        assert_relative_rms(step.attention(True), want[tokens], 2e-6)
        store_kv(step.k, step.v, step.context, own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(2, 2, 12), (2, 1, 16)])
def test_storing_writes_what_the_reference_writes(dtype: torch.dtype, heads: Heads) -> None:
    """And nothing else in the pools of all layers."""
    rows = [*RAGGED, Row(40, 30, 5), Row(1, 7, 6)]
    case, other = (make(rows, heads, 8, dtype) for _ in range(2))
    store_kv(case.k, case.v, case.context, case.rows)
    reference.store_kv(other.k, other.v, other.context, other.rows)
    for got, want in ((case.context.k, other.context.k), (case.context.v, other.context.v)):
        assert_same_bits(_whole(got), _whole(want))
    assert bool((_whole(case.context.k) == _whole(case.context.k)).any())


def _whole(view: Tensor) -> Tensor:
    """All of the memory that a view lies in."""
    base = view._base
    assert base is not None
    return base


def test_no_tokens() -> None:
    case = make([Row(0, 3)])
    assert case.attention(True).shape == (0, 32)
    store_kv(case.k, case.v, case.context, case.rows)


def test_what_is_refused() -> None:
    case = make([Row(2, 3)])
    with pytest.raises(ValueError, match=r"got torch\.float16, torch\.float32, expected one dtype"):
        replace(case, q=case.q.half()).attention(True)
    with pytest.raises(ValueError, match="head_dim: got 136, expected at most 128"):
        make([Row(2, 3)], (1, 1, 136)).attention(True)


KERNELS = "twotower.kernels.attention_triton"
ROW_TENSORS = {"cu_seqlens": "*i32", "slots": "*i32", "context_lens": "*i32"}
PARTIALS = {"maxima": "*fp32", "totals": "*fp32", "values": "*fp32"}
NEW = {"k_new": "*bf16", "v_new": "*bf16", "k_pool": "*bf16", "v_pool": "*bf16"}
STRIDES = dict.fromkeys(("new_token", "new_head", "pool_head", "pool_token"), "i32:16")
TABLE = {"pages": "*i32", "pages_slot": "i32:16"}
HEAD_DIMS = {"HEAD_DIM": 128, "BLOCK_D": 128, "PAGE": 64}
BLOCK = {"SPLITS": 16, "SPLIT_TOKENS": 512, "SHORT_TOKENS": 64}
SINGLE = {"SPLITS": 64, "SPLIT_TOKENS": 256, "SHORT_TOKENS": 64}


def launch(sizes: dict[str, int], causal: bool, rows: int, warps: int) -> Launch:
    """Attention with 32 query heads, 2 KV heads of 128."""
    signature = {"q": "*bf16", "out": "*bf16", "q_token": "i32:16", "q_head": "i32:16"}
    signature |= {**NEW, **PARTIALS, **ROW_TENSORS, **TABLE, **STRIDES, "short": "i32"}
    tiles = {"BLOCK_M": rows, "BLOCK_N": 64, "PER_KV": 16, "SCALE": 0.1275, "CAUSAL": causal}
    return Launch(f"{KERNELS}:_attention_kernel", signature, {**HEAD_DIMS, **sizes, **tiles}, warps)


def merge(sizes: dict[str, int]) -> Launch:
    constants = {**HEAD_DIMS, **sizes, "HEADS": 32, "BLOCK_M": 4, "GROUP": 16}
    signature = {"out": "*bf16", **PARTIALS, **ROW_TENSORS, "short": "i32"}
    return Launch(f"{KERNELS}:_merge_kernel", signature, constants)


MATRIX = {
    "block": (launch(BLOCK, False, 64, 4), "HGMMA"),
    "extension": (launch(BLOCK, True, 64, 4), "HGMMA"),
    "piece of a prompt": (launch(BLOCK, True, 128, 8), "HGMMA"),
    "single": (launch(SINGLE, True, 16, 4), "HMMA"),
}
OTHER = [
    merge(SINGLE),
    Launch(
        f"{KERNELS}:_store_kernel",
        {**NEW, **ROW_TENSORS, **TABLE, **STRIDES},
        {**HEAD_DIMS, "BLOCK_T": 16},
    ),
]


def test_kernels_compile_for_a_gpu() -> None:
    """Without spills; products on the tensor core, K/V loaded ahead in wide pieces."""
    compiled = compile_all([launch for launch, _ in MATRIX.values()] + OTHER)
    for (name, (_, product)), made in zip(MATRIX.items(), compiled, strict=False):
        assert made.instructions[product] > 0, name
        assert made.instructions["LDGSTS"] >= 24, name
        assert made.shared_bytes <= 227 * 1024, name
    assert [made.spills for made in compiled] == [0] * len(compiled)


REAL: Heads = (32, 2, 128)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "causal"),
    [
        ([Row(16, s, s) for s in (0, 1, 63, 513, 4096, 33000)] + [Row(16, 9, 7, True)], False),
        ([Row(16, s, s) for s in (0, 1, 63, 513, 4096, 33000)], True),
        ([Row(1, s, s) for s in (0, 1, 64, 300, 4096, 33000)], True),
        ([Row(2500, 300, 1), Row(700, 0, 2), Row(16, 5000, 3), Row(64, 100, 4)], True),
        ([Row(64, 1000, 1), Row(32, 70, 2)], False),
    ],
)
def test_real_shapes(rows: list[Row], causal: bool) -> None:
    case = make(rows, REAL, 64, torch.bfloat16)
    check(case, causal)
    assert_same_bits(case.attention(causal), case.attention(causal), "a second run")


@pytest.mark.gpu
@pytest.mark.parametrize(("length", "causal"), [(16, False), (16, True), (1, True)])
def test_real_rows_alone_are_rows_of_a_batch(length: int, causal: bool) -> None:
    rows = [Row(length, seen, seen) for seen in (70, 4096, 9, 0, 12345)]
    case = make(rows, REAL, 64, torch.bfloat16, order=1)
    whole = case.attention(causal)
    for number, row in enumerate(rows):
        alone = make([row], REAL, 64, torch.bfloat16, order=2).attention(causal)
        assert_same_bits(whole[case.rows.host.slice_of(number)], alone, row)


@pytest.mark.gpu
def test_a_graph_follows_the_tensors_of_its_rows() -> None:
    """Captured once, replayed for rows of other slots, contexts and with padding."""
    rows = [Row(16, seen, seen) for seen in (4096, 0, 700, 90)]
    case = make(rows, REAL, 64, torch.bfloat16)

    def step() -> Tensor:
        store_kv(case.k, case.v, case.context, case.rows)
        return case.attention(False)

    want_before = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    graph.replay()
    assert_same_bits(out, want_before)
    order = torch.tensor([2, 0, 3, 1], device=DEVICE)
    case.rows.slots.copy_(case.rows.slots[order])
    case.rows.context_lens.copy_(case.rows.context_lens[order])
    case.rows.slots[3] = -1
    want = case.attention(False)
    out.fill_(NAN)
    graph.replay()
    assert_same_bits(out[:48], want[:48])
    assert bool(out[48:].isnan().all())
