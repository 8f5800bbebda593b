"""The router kernel against the reference and against cases by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.comparing import assert_rows_are_independent, assert_same_bits, normal
from tests.support.hopper import Launch, compile_all
from twotower.kernels import moe, router_triton
from twotower.kernels.expert_tiles_triton import BLOCK, PAIRS_OF_ONE_WARP, Tiles, sort_by_expert
from twotower.kernels.experts_triton import tiling_of
from twotower.kernels.moe import RouterRule, Routing, narrow_parts
from twotower.kernels.router_triton import SORTED_AT_ONCE, route

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HIDDEN, EXPERTS = 16, 12


def rule(
    top_k: int = 3,
    groups: int = 1,
    top_groups: int = 1,
    normalize: bool = True,
    scaling: float = 1.0,
) -> RouterRule:
    return RouterRule(top_k, groups, top_groups, normalize, scaling)


def run(x: Tensor, weight: Tensor, bias: Tensor, how: RouterRule) -> tuple[Tensor, Tensor]:
    ids, scores, _ = route(x.to(DEVICE), weight.to(DEVICE), bias.to(DEVICE), how)
    assert ids.dtype == torch.int64
    assert scores.dtype == torch.float32
    return ids.cpu(), scores.cpu()


def zeros(experts: int = EXPERTS) -> Tensor:
    return torch.zeros(experts, HIDDEN, dtype=torch.float64)


RULES = [
    rule(),
    rule(top_k=1),
    rule(top_k=EXPERTS, scaling=0.1),
    rule(normalize=False, scaling=2.7),
    rule(groups=3, top_groups=2),
    rule(groups=3, top_groups=1, top_k=4),
    rule(groups=4, top_groups=2, top_k=6),
    rule(groups=6, top_groups=2, normalize=False),
    rule(groups=12, top_groups=5, scaling=1.5),
]


def test_padding_gets_no_expert_whatever_its_tokens_hold() -> None:
    x, weight, bias = normal(5, HIDDEN), normal(EXPERTS, HIDDEN, seed=1).double(), normal(EXPERTS)
    real = torch.tensor([True, False, True, True, False])
    x[1] = float("nan")
    args = (x.to(DEVICE), weight.to(DEVICE), bias.to(DEVICE), rule())
    ids = route(*args, real.to(DEVICE))[0].cpu()
    assert_same_bits(ids[real], run(x[real], weight, bias, rule())[0])
    assert ids[~real].tolist() == [[-1] * 3] * 2
    assert_same_bits(ids[real], moe.route(x, weight, bias, rule(), real)[0][real])


@pytest.mark.parametrize("how", RULES)
@pytest.mark.parametrize("bias_scale", [0.0, 0.3, 3.0])
def test_it_chooses_as_the_reference(how: RouterRule, bias_scale: float) -> None:
    x, weight = normal(6, HIDDEN), normal(EXPERTS, HIDDEN, seed=1).double()
    bias = normal(EXPERTS, seed=2, scale=bias_scale)
    ids, scores = run(x, weight, bias, how)
    want_ids, want_scores, _ = moe.route(x, weight, bias, how)
    assert_same_bits(ids, want_ids)
    torch.testing.assert_close(scores, want_scores, rtol=2e-7, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 8])
def test_real_numbers_of_experts(dtype: torch.dtype, groups: int) -> None:
    x, weight = normal(5, 64).to(dtype), normal(128, 64, seed=1, scale=0.2).double()
    bias, how = normal(128, seed=2, scale=0.1), rule(6, groups, max(1, groups // 2), True, 2.5)
    ids, scores = run(x, weight, bias, how)
    want_ids, want_scores, _ = moe.route(x, weight, bias, how)
    assert_same_bits(ids, want_ids)
    torch.testing.assert_close(scores, want_scores, rtol=2e-7, atol=0.0)


def test_the_bias_moves_the_choice_but_not_the_weights() -> None:
    bias = torch.zeros(EXPERTS)
    bias[[2, 7, 9]] = torch.tensor([0.5, 5.0, 1.0])
    ids, scores = run(torch.zeros(1, HIDDEN), zeros(), bias, rule(normalize=False))
    assert ids.tolist() == [[7, 9, 2]]
    assert scores.tolist() == [[0.5, 0.5, 0.5]]


def test_ties_go_to_the_lower_expert_and_group() -> None:
    x, bias = normal(2, HIDDEN), torch.zeros(EXPERTS)
    assert run(x, zeros(), bias, rule())[0].tolist() == [[0, 1, 2]] * 2
    lowest = run(x, zeros(), bias, rule(groups=3, top_groups=1, top_k=6))[0]
    assert lowest.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    # Two best of each group are equal, though the third of the last is larger.
    bias[:] = torch.tensor([1.0, 1.0, 0.0, 0.0] * 2 + [1.0, 1.0, 0.9, 0.0])
    best = run(x, zeros(), bias, rule(groups=3, top_groups=2, top_k=5))[0]
    assert best.tolist() == [[0, 1, 4, 5, 2]] * 2


def test_a_group_counts_its_two_best_even_if_they_are_equal() -> None:
    bias = torch.tensor([2.0, 2.0, -9.0, 3.0, 0.0, -9.0])
    ids, _ = run(normal(1, HIDDEN), zeros(6), bias, rule(top_k=2, groups=2, top_groups=1))
    assert ids.tolist() == [[0, 1]]


def test_an_expert_of_a_lost_group_counts_as_zero_not_as_minus_infinity() -> None:
    bias = torch.tensor([-0.6, -0.6, -3.0, -3.0])
    ids, _ = run(normal(1, HIDDEN), zeros(4), bias, rule(top_k=2, groups=2, top_groups=1))
    assert ids.tolist() == [[2, 3]]


def test_scores_that_only_fp64_tells_apart() -> None:
    weight = zeros(4)
    weight[2, 0], weight[1, 0] = 1.0 + 1e-12, 1.0
    ids, _ = run(torch.ones(1, HIDDEN), weight, torch.zeros(4), rule(top_k=2))
    assert ids.tolist() == [[2, 1]]


@pytest.mark.parametrize("how", [rule(), rule(groups=3, top_groups=2)])
def test_nan_gives_nan_weights_and_ids_that_exist(how: RouterRule) -> None:
    x = normal(3, HIDDEN)
    x[1] = float("nan")
    ids, scores = run(x, normal(EXPERTS, HIDDEN, seed=1).double(), torch.zeros(EXPERTS), how)
    assert sorted(set(ids[1].tolist())) == sorted(ids[1].tolist())
    assert 0 <= int(ids.min()) <= int(ids.max()) < EXPERTS
    assert bool(scores[1].isnan().all())
    assert bool(scores[[0, 2]].isfinite().all())


def test_x_may_be_columns_of_a_wider_tensor() -> None:
    weight, bias = normal(EXPERTS, HIDDEN, seed=1).double(), normal(EXPERTS, seed=2)
    wide = normal(7, HIDDEN + 5)
    wide[:, HIDDEN:] = float("nan")
    x = wide[:, :HIDDEN]
    assert_same_bits(run(x, weight, bias, rule())[0], moe.route(x, weight, bias, rule())[0])


def test_choices_of_a_row_are_its_own() -> None:
    """The product is torch's, so that scores may differ in the last bit; choices do not."""
    weight, bias, how = normal(EXPERTS, 130, seed=1).double(), normal(EXPERTS, seed=2), RULES[4]
    rows = normal(12, 130)
    assert_rows_are_independent(lambda x: run(x, weight, bias, how)[0], rows, sizes=(1, 7))


def test_no_tokens() -> None:
    ids, scores = run(torch.empty(0, HIDDEN), zeros(), torch.zeros(EXPERTS), rule())
    assert ids.shape == scores.shape == (0, 3)


def near_ties(tokens: int, hidden: int, in_fp32: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens in bf16, a weight and a bias under which half of the experts come in pairs that all
    but agree: one element of a row differs from its twin's by its last bit."""
    x = normal(tokens, hidden).bfloat16()
    weight = normal(EXPERTS, hidden, seed=1, scale=hidden**-0.5)
    weight = weight if in_fp32 else weight.bfloat16().float()
    for expert in range(0, EXPERTS - 1, 2):
        column, last = 3 * expert % hidden, 2.0**-7 if not in_fp32 else 2.0**-20
        weight[expert, column] = 2.0**-8
        weight[expert + 1] = weight[expert]
        weight[expert + 1, column] *= 1.0 + last
    return x, weight.double(), normal(EXPERTS, seed=2, scale=0.2).repeat_interleave(2)[:EXPERTS]


def by_expert(choice: Routing) -> tuple[Tensor, Tensor]:
    """Ids in ascending order and their weights: experts on one side of the border may change
    places where their scores all but agree."""
    ids, order = choice[0].cpu().sort(dim=1)
    return ids, choice[1].cpu().gather(1, order)


@pytest.mark.usefixtures("products_of_bf16")
@pytest.mark.parametrize("in_fp32", [False, True])
@pytest.mark.parametrize(("tokens", "hidden"), [(70, 130), (5, 256), (1, 64)])
def test_products_in_pieces_choose_as_fp64(tokens: int, hidden: int, in_fp32: bool) -> None:
    x, weight, bias = near_ties(tokens, hidden, in_fp32)
    narrow = narrow_parts(weight)
    assert narrow is not None
    assert len(narrow) == (3 if in_fp32 else 1)
    args = [own.to(DEVICE) for own in (x, weight, bias)]
    for how in (rule(), rule(top_k=1), rule(top_k=EXPERTS), rule(top_k=4, normalize=False)):
        got = by_expert(route(*args, how, None, narrow.to(DEVICE)))
        want = by_expert(moe.route(x, weight, bias, how))
        assert_same_bits(got[0], want[0])
        torch.testing.assert_close(got[1], want[1], rtol=2e-6, atol=0.0)


@pytest.mark.usefixtures("products_of_bf16")
def test_what_only_fp64_tells_apart_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pairs above are closer than what a piece's sum in fp32 tells: without the second look,
    some token chooses otherwise."""
    x, weight, bias = near_ties(70, 256, True)
    narrow = narrow_parts(weight)
    assert narrow is not None
    want = by_expert(moe.route(x, weight, bias, rule()))[0]
    args = [own.to(DEVICE) for own in (x, weight, bias)]
    monkeypatch.setattr(router_triton, "_MARGIN", -1.0)
    assert not torch.equal(by_expert(route(*args, rule(), None, narrow.to(DEVICE)))[0], want)


def test_narrow_parts_are_the_weight_itself() -> None:
    weight = normal(4, 9, seed=3)
    for own, count in ((weight.bfloat16().double(), 1), (weight.double(), 3)):
        parts = narrow_parts(own)
        assert parts is not None
        assert (parts.dtype, len(parts)) == (torch.bfloat16, count)
        assert_same_bits(parts.double().sum(0), own)
    assert narrow_parts(weight.double() / 3.0) is None


def test_groups_and_other_dtypes_take_the_product_in_fp64() -> None:
    weight = normal(EXPERTS, HIDDEN, seed=1).bfloat16().double()
    narrow, bias = narrow_parts(weight), normal(EXPERTS, seed=2)
    assert narrow is not None
    for x, how in ((normal(6, HIDDEN), rule()), (normal(6, HIDDEN).bfloat16(), RULES[4])):
        args = (x.to(DEVICE), weight.to(DEVICE), bias.to(DEVICE), how)
        got = route(*args, None, narrow.to(DEVICE))
        for own, want in zip(got[:2], route(*args)[:2], strict=True):
            assert_same_bits(own, want)


@pytest.mark.usefixtures("products_of_bf16")
@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("tokens", [1, 5, SORTED_AT_ONCE, SORTED_AT_ONCE + 1, BLOCK + 1, 200])
def test_choices_come_sorted_for_their_products(tokens: int, pieces: bool) -> None:
    x = normal(tokens, HIDDEN).bfloat16()
    weight = normal(EXPERTS, HIDDEN, seed=1).bfloat16().double()
    real = torch.arange(tokens) % 3 != 1
    narrow = narrow_parts(weight) if pieces else None
    for marks in (None, real.to(DEVICE)):
        args = (x.to(DEVICE), weight.to(DEVICE), torch.zeros(EXPERTS, device=DEVICE))
        ids, _, tiles = route(*args, rule(), marks, None if narrow is None else narrow.to(DEVICE))
        assert isinstance(tiles, Tiles)
        assert tiles.rows == tiling_of(tokens, x.dtype).rows
        want = sort_by_expert(ids, EXPERTS, tiles.rows)
        count, used = int(want.table[0]), int((ids >= 0).sum())
        assert tiles.table[: 1 + 3 * count].tolist() == want.table[: 1 + 3 * count].tolist()
        assert tiles.pairs[:used].tolist() == want.pairs[:used].tolist()
        order = sorted(range(ids.numel()), key=lambda pair: (int(ids.flatten()[pair]), pair))
        assert tiles.pairs[:used].tolist() == order[ids.numel() - used :]


@pytest.mark.usefixtures("products_of_bf16")
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    hidden=st.sampled_from([16, 130, 200]),
    last=st.integers(-52, -6),
    top_k=st.integers(1, EXPERTS),
    in_fp32=st.booleans(),
    outlier=st.sampled_from([1.0, 10.0, 100.0]),
)
def test_near_ties_of_any_distance_are_decided_as_in_fp64(
    seed: int, hidden: int, last: int, top_k: int, in_fp32: bool, outlier: float
) -> None:
    """Every expert has a twin whose score differs by a factor of 1 + 2^last in one channel (or by
    the least that its dtype allows), with one channel of the tokens far larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, hidden, generator=generator)
    x[:, seed % hidden] *= outlier
    weight = torch.randn(EXPERTS, hidden, generator=generator) * hidden**-0.5
    weight = weight if in_fp32 else weight.bfloat16().float()
    for expert in range(0, EXPERTS, 2):
        column = int(torch.randint(hidden, (), generator=generator))
        weight[expert + 1] = weight[expert]
        weight[expert + 1, column] *= 1.0 + 2.0 ** max(last, -20 if in_fp32 else -7)
    weight = weight if in_fp32 else weight.bfloat16().float()
    bias = torch.randn(EXPERTS, generator=generator).mul(0.2)
    bias[1::2] = bias[::2]
    narrow, x = narrow_parts(weight.double()), x.bfloat16()
    assert narrow is not None
    args = [own.to(DEVICE) for own in (x, weight.double(), bias)]
    got = by_expert(route(*args, rule(top_k), None, narrow.to(DEVICE)))
    want = by_expert(moe.route(x, weight.double(), bias, rule(top_k)))
    assert_same_bits(got[0], want[0])


CHOICE = {
    "expert_lanes": 128,
    "block": BLOCK,
    "tile_rows": 16,
    "at_once": PAIRS_OF_ONE_WARP,
    "with_padding": True,
    "experts": 128,
    "top_k": 6,
    "normalize": True,
    "scaling": 2.5,
    "slot_lanes": 8,
    "hidden": 2688,
    "margin": 1e-5,
    "exact_piece": 1024,
}
LAUNCHES = [
    *(
        Launch(
            "twotower.kernels.router_triton:_choose_kernel",
            {
                "logits": "*fp32" if pieces else "*fp64",
                "x": "*bf16",
                "router": "*fp64",
                "bias": "*fp32",
                "real_tokens": "*i1",
                "ids": "*i64",
                "weights": "*fp32",
                **dict.fromkeys(["counts", "pairs", "table"], "*i32"),
                "tokens": "i32",
                "x_stride": "i32:16",
                "router_stride": "i32:16",
            },
            {
                **CHOICE,
                "pieces": pieces,
                "sorts": sorts,
                "groups": groups,
                "top_groups": max(1, groups // 2),
                "group_lanes": groups,
                "member_lanes": 128 // groups,
            },
            num_warps=1,
        )
        for groups, pieces, sorts in (
            (1, 0, False),
            (8, 0, True),
            (1, 21, False),
            (1, 21, True),
        )
    ),
    *(
        Launch(
            "twotower.kernels.router_triton:_pieces_kernel",
            {
                **dict.fromkeys(["x", "narrow"], "*bf16"),
                "out": "*fp32",
                "counts": "*i32",
                **dict.fromkeys(["num_counts", "tokens", "experts"], "i32"),
                **dict.fromkeys(["x_stride", "part_stride", "expert_stride"], "i32:16"),
            },
            {"hidden": 2688, "parts": parts, "piece": 128, "tile_experts": 64, "tile_rows": rows},
            num_warps=4,
        )
        for parts, rows in ((1, 16), (3, 64))
    ),
]


def test_it_compiles_for_hopper_without_spills() -> None:
    for launch, compiled in zip(LAUNCHES, compile_all(LAUNCHES), strict=True):
        assert compiled.spills == 0, launch


@pytest.mark.gpu
@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("tokens", [1, 16, 1024])
def test_real_shapes(tokens: int, pieces: bool) -> None:
    x = normal(tokens, 2688).bfloat16()
    weight = normal(128, 2688, seed=1, scale=0.02).bfloat16().double()
    bias, how = normal(128, seed=2, scale=0.05), rule(6, scaling=2.5)
    narrow = narrow_parts(weight) if pieces else None
    args = (x.to(DEVICE), weight.to(DEVICE), bias.to(DEVICE), how)
    ids, scores, _ = route(*args, None, None if narrow is None else narrow.to(DEVICE))
    want_ids, want_scores, _ = moe.route(x, weight, bias, how)
    assert_same_bits(ids.cpu(), want_ids)
    # A score's relative error is that of its product: about 1e-6 in pieces of fp32.
    rtol = 5e-6 if pieces else 2e-7
    torch.testing.assert_close(scores.cpu(), want_scores, rtol=rtol, atol=0.0)
