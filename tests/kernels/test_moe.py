"""Router and experts against a loop over tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.support.comparing import (
    assert_relative_rms,
    assert_rows_are_independent,
    assert_same_bits,
    normal,
)
from twotower.kernels.linear import pack
from twotower.kernels.moe import ExpertWeights, RouterRule, experts, mlp, route
from twotower.kernels.quantized import QuantizedExperts, quantize, quantize_tokens

HIDDEN, WIDTH, EXPERTS = 16, 12, 12
# An MLP that gives exact zeros: what is left is the sum of the routed experts.
NO_SHARED = torch.zeros(1, HIDDEN), torch.zeros(HIDDEN, 1)


def rule(
    top_k: int = 3,
    groups: int = 1,
    top_groups: int = 1,
    normalize: bool = True,
    scaling: float = 1.0,
) -> RouterRule:
    return RouterRule(top_k, groups, top_groups, normalize, scaling)


def true_route(x: Tensor, weight: Tensor, bias: Tensor, how: RouterRule) -> list[dict[int, float]]:
    """Per token: expert id -> weight."""
    chosen = []
    for token in x.double():
        scores = [1.0 / (1.0 + math.exp(-float(row.double() @ token))) for row in weight]
        choice = [s + float(b) for s, b in zip(scores, bias, strict=True)]
        size = len(scores) // how.groups
        totals = [sum(sorted(choice[g * size : (g + 1) * size])[-2:]) for g in range(how.groups)]
        best = sorted(range(how.groups), key=lambda g: (-totals[g], g))[: how.top_groups]
        if how.groups > 1:
            choice = [c if e // size in best else 0.0 for e, c in enumerate(choice)]
        ids = sorted(range(len(scores)), key=lambda e: (-choice[e], e))[: how.top_k]
        total = sum(scores[e] for e in ids) + 1e-20 if how.normalize else 1.0
        chosen.append({e: scores[e] / total * how.scaling for e in ids})
    return chosen


RULES = [
    rule(),
    rule(top_k=1),
    rule(normalize=False, scaling=2.5),
    rule(groups=3, top_groups=2),
    rule(groups=3, top_groups=1, top_k=4),
    rule(groups=6, top_groups=2, normalize=False),
    rule(groups=12, top_groups=5, scaling=1.5),
]


@pytest.mark.parametrize("how", RULES)
@pytest.mark.parametrize("bias_scale", [0.0, 0.3, 3.0])
def test_the_choice_and_its_weights(how: RouterRule, bias_scale: float) -> None:
    x, weight = normal(30, HIDDEN), normal(EXPERTS, HIDDEN, seed=1).double()
    bias = normal(EXPERTS, seed=2, scale=bias_scale)
    ids, weights, _ = route(x, weight, bias, how)
    assert weights.dtype == torch.float32
    for token, want in enumerate(true_route(x, weight, bias, how)):
        assert ids[token].tolist() == list(want)
        assert weights[token].tolist() == pytest.approx(list(want.values()), rel=1e-6)


def test_the_bias_moves_the_choice_but_not_the_weights() -> None:
    x, weight = torch.zeros(1, HIDDEN), torch.zeros(EXPERTS, HIDDEN, dtype=torch.float64)
    bias = torch.zeros(EXPERTS)
    bias[[2, 7, 9]] = torch.tensor([0.5, 5.0, 1.0])
    ids, weights, _ = route(x, weight, bias, rule(normalize=False))
    assert ids.tolist() == [[7, 9, 2]]
    assert weights.tolist() == [[0.5, 0.5, 0.5]]


def test_ties_go_to_the_lower_expert_and_group() -> None:
    x, weight = normal(2, HIDDEN), torch.zeros(EXPERTS, HIDDEN, dtype=torch.float64)
    ids, *_ = route(x, weight, torch.zeros(EXPERTS), rule())
    assert ids.tolist() == [[0, 1, 2]] * 2
    ids, *_ = route(x, weight, torch.zeros(EXPERTS), rule(groups=3, top_groups=1))
    assert ids.tolist() == [[0, 1, 2]] * 2


def test_an_expert_of_a_lost_group_counts_as_zero_not_as_minus_infinity() -> None:
    """With negative choice scores in the best group, the zeros outside win."""
    weight = torch.zeros(4, HIDDEN, dtype=torch.float64)
    bias = torch.tensor([-0.6, -0.6, -3.0, -3.0])
    ids, *_ = route(normal(1, HIDDEN), weight, bias, rule(top_k=2, groups=2, top_groups=1))
    assert ids.tolist() == [[2, 3]]


def test_scores_that_only_fp64_tells_apart() -> None:
    weight = torch.zeros(4, HIDDEN, dtype=torch.float64)
    weight[2, 0], weight[1, 0] = 1.0 + 1e-12, 1.0
    ids, *_ = route(torch.ones(1, HIDDEN), weight, torch.zeros(4), rule(top_k=2))
    assert ids.tolist() == [[2, 1]]


@pytest.mark.parametrize("how", [rule(), rule(groups=3, top_groups=2)])
def test_routed_rows_are_independent(how: RouterRule) -> None:
    weight, bias = normal(EXPERTS, 130, seed=1).double(), normal(EXPERTS, seed=2)
    rows = normal(40, 130)
    assert_rows_are_independent(lambda x: route(x, weight, bias, how)[0], rows)
    assert_rows_are_independent(lambda x: route(x, weight, bias, how)[1], rows)


def make_experts() -> tuple[Tensor, Tensor]:
    return normal(EXPERTS, WIDTH, HIDDEN, seed=3), normal(EXPERTS, HIDDEN, WIDTH, seed=4)


def choose(tokens: int, top_k: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator) for _ in range(tokens)])
    return ids[:, :top_k], normal(tokens, top_k, seed=6)


def make_shared() -> tuple[Tensor, Tensor]:
    return normal(WIDTH + 4, HIDDEN, seed=7), normal(HIDDEN, WIDTH + 4, seed=8)


def true_experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: ExpertWeights,
    down: ExpertWeights,
    shared_up: Tensor,
    shared_down: Tensor,
) -> Tensor:
    def one(token: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return second.double() @ (first.double() @ token).clamp_min(0.0) ** 2

    wide = x.double()
    want = torch.stack([one(token, shared_up, shared_down) for token in wide])
    for token, (own, scores) in enumerate(zip(ids.tolist(), weights.tolist(), strict=True)):
        for expert, score in zip(own, scores, strict=True):
            if expert >= 0:
                want[token] += score * one(wide[token], up[expert], down[expert])
    return want


@pytest.mark.parametrize("tokens", [1, 2, 3, 17])
@pytest.mark.parametrize("top_k", [1, 3, EXPERTS])
def test_experts_against_a_loop(tokens: int, top_k: int) -> None:
    x, (up, down), (ids, weights) = normal(tokens, HIDDEN), make_experts(), choose(tokens, top_k)
    shared = make_shared()
    got = experts(x, ids, weights, up, down, *shared)
    assert_relative_rms(got, true_experts(x, ids, weights, up, down, *shared), 1e-6)
    packed = [pack(one) for one in up], [pack(one) for one in down]
    packed_shared = pack(shared[0]), pack(shared[1])
    assert_same_bits(experts(x, ids, weights, *packed, *packed_shared), got)


def test_the_shared_mlp_is_added_to_what_the_experts_give() -> None:
    x, (up, down), (ids, weights) = normal(5, HIDDEN), make_experts(), choose(5)
    routed = experts(x, ids, weights, up, down, *NO_SHARED)
    nobody = torch.full_like(ids, -1)
    shared = experts(x, nobody, weights, up, down, *make_shared())
    assert_same_bits(shared, mlp(x, *make_shared()))
    assert_same_bits(experts(x, ids, weights, up, down, *make_shared()), routed + shared)


def test_experts_that_nobody_chose_are_not_read() -> None:
    up, down = make_experts()
    up[4:], down[4:] = float("nan"), float("nan")
    ids, weights = torch.tensor([[0, 3], [1, 0]]), torch.ones(2, 2)
    got = experts(normal(2, HIDDEN), ids, weights, up, down, *make_shared())
    assert bool(torch.isfinite(got).all())


@pytest.mark.parametrize("tokens", [1, 2, 17])
@pytest.mark.parametrize("kind", ["fp32", "packed", "8 bits"])
def test_an_id_of_minus_one_is_no_expert(tokens: int, kind: str) -> None:
    """Anywhere among a token's ids, in some tokens or in all, whatever score it stands with."""
    x, (up, down), (ids, weights) = normal(tokens, HIDDEN), make_experts(), choose(tokens, 4)
    own: tuple[ExpertWeights, ExpertWeights] = up, down
    if kind == "packed":
        own = [pack(one) for one in up], [pack(one) for one in down]
    if kind == "8 bits":
        own = quantize(up), quantize(down)
        up, down = (torch.stack([part[e] for e in range(EXPERTS)]) for part in own)
    for pattern in ([0], [3], [1, 2], [0, 1, 2, 3]):
        some = ids.clone()
        some[::2, pattern] = -1
        got = experts(x, some, weights, *own, *make_shared())
        want = true_experts(x, some, weights, up, down, *make_shared())
        assert_relative_rms(got, want, 1e-6)
    # A token keeps its bits when its neighbours have no experts.
    some = ids.clone()
    some[1::2] = -1
    whole, part = (experts(x, chosen, weights, *own, *make_shared()) for chosen in (ids, some))
    assert_same_bits(part[::2], whole[::2])


@pytest.mark.parametrize("tokens", [1, 6])
def test_experts_in_8_bits_give_what_their_widened_matrices_give(tokens: int) -> None:
    x, (up, down), (ids, weights) = normal(tokens, HIDDEN), make_experts(), choose(tokens)
    narrow = quantize(up), quantize(down)
    wide_up, wide_down = (torch.stack([part[e] for e in range(EXPERTS)]) for part in narrow)
    assert not torch.equal(wide_up, up)
    got = experts(x, ids, weights, *narrow, *make_shared())
    assert_same_bits(got, experts(x, ids, weights, wide_up, wide_down, *make_shared()))
    shared_up, shared_down = (part.bfloat16() for part in make_shared())
    half = experts(x.bfloat16(), ids, weights, *narrow, shared_up, shared_down)
    assert half.dtype == torch.bfloat16
    assert_relative_rms(half, got, 2e-2)


def make_fp8() -> tuple[QuantizedExperts, QuantizedExperts]:
    up, down = (quantize(one, "fp8") for one in make_experts())
    return up, down


def true_fp8(
    x: Tensor, ids: Tensor, weights: Tensor, up: QuantizedExperts, down: QuantizedExperts
) -> Tensor:
    """Products in 8 bits, value by value in fp64, without a shared MLP."""

    def product(row: Tensor, own: QuantizedExperts, expert: int) -> Tensor:
        values, scale = quantize_tokens(row[None].float())
        total = own.values[expert].double() @ values[0].double()
        return total * own.scale[expert].double() * scale[0].double()

    want = torch.zeros(x.shape, dtype=torch.float64)
    for token, (own, scores) in enumerate(zip(ids.tolist(), weights.tolist(), strict=True)):
        for expert, score in zip(own, scores, strict=True):
            if expert >= 0:
                inner = product(x[token], up, expert).clamp_min(0.0) ** 2
                want[token] += score * product(inner, down, expert)
    return want


@pytest.mark.parametrize("tokens", [1, 2, 17])
def test_products_in_8_bits_against_a_loop(tokens: int) -> None:
    x, (up, down), (ids, weights) = normal(tokens, HIDDEN), make_fp8(), choose(tokens)
    if tokens > 1:
        ids[1, 2] = -1
    got = experts(x, ids, weights, up, down, *NO_SHARED)
    # A sum that rounds to another 8-bit value moves it by a sixteenth.
    assert_relative_rms(got, true_fp8(x, ids, weights, up, down), 1e-2)
    exact = true_experts(x, ids, weights, up, down, *NO_SHARED)
    assert_relative_rms(got, exact, 0.1)
    with pytest.raises(AssertionError, match="relative RMS"):
        assert_relative_rms(got, exact, 1e-2)
    half = experts(x.bfloat16(), ids, weights, up, down, *(one.bfloat16() for one in NO_SHARED))
    assert half.dtype == torch.bfloat16
    assert_relative_rms(half, got, 0.1)


def test_the_shared_mlp_is_multiplied_in_the_inputs_dtype() -> None:
    x, (ids, weights) = normal(5, HIDDEN), choose(5)
    nobody = torch.full_like(ids, -1)
    got = experts(x, nobody, weights, *make_fp8(), *make_shared())
    assert_same_bits(got, mlp(x, *make_shared()))


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_token_that_is_not_finite_is_seen_after_products_in_8_bits(wrong: float) -> None:
    x, (ids, weights) = normal(6, HIDDEN), choose(6)
    x[4, 3] = wrong
    got = experts(x, ids, weights, *make_fp8(), *NO_SHARED)
    assert bool(got[4].isnan().all())
    assert bool(got[torch.arange(6) != 4].isfinite().all())


def test_a_square_too_large_for_the_dtype_is_seen_after_products_in_8_bits() -> None:
    x, (ids, weights) = normal(3, HIDDEN), choose(3)
    x[1] *= 1e25
    got = experts(x, ids, weights, *make_fp8(), *NO_SHARED)
    assert bool(got[1].isnan().all())
    assert bool(got[[0, 2]].isfinite().all())


@pytest.mark.parametrize("kind", ["fp32", "8 bits", "products in 8 bits"])
def test_rows_of_the_experts_are_independent(kind: str) -> None:
    (up, down), (ids, weights) = make_experts(), choose(40)
    own: tuple[ExpertWeights, ExpertWeights] = up, down
    if kind == "8 bits":
        own = quantize(up), quantize(down)
    if kind == "products in 8 bits":
        own = make_fp8()
    x = normal(40, HIDDEN)
    ids[::3, 1] = -1

    def run(rows: Tensor) -> Tensor:
        chosen = rows.long()
        return experts(x[chosen], ids[chosen], weights[chosen], *own, *make_shared())

    assert_rows_are_independent(run, torch.arange(40.0))


def test_the_input_of_the_experts_is_only_read() -> None:
    x, (up, down), (ids, weights) = normal(5, HIDDEN), make_experts(), choose(5)
    before = x.clone()
    experts(x, ids, weights, up, down, *make_shared())
    mlp(x, up[0], down[0])
    assert_same_bits(x, before)


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_dense_mlp(with_bias: bool) -> None:
    x, up, down = normal(5, HIDDEN), normal(WIDTH, HIDDEN, seed=1), normal(HIDDEN, WIDTH, seed=2)
    biases = (normal(WIDTH, seed=3), normal(HIDDEN, seed=4)) if with_bias else (None, None)
    inner = x.double() @ up.double().T
    if biases[0] is not None:
        inner = inner + biases[0].double()
    want = inner.clamp_min(0.0) ** 2 @ down.double().T
    if biases[1] is not None:
        want = want + biases[1].double()
    assert_relative_rms(mlp(x, up, down, *biases), want, 1e-6)
    assert_rows_are_independent(lambda rows: mlp(rows, up, down, *biases), normal(40, HIDDEN))
