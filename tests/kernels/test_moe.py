"""Router and experts against a loop over tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.comparing import (
    assert_relative_rms,
    assert_rows_are_independent,
    assert_same_bits,
    normal,
)
from twotower.kernels.linear import pack
from twotower.kernels.moe import RouterRule, experts, mlp, route

HIDDEN, WIDTH, EXPERTS = 16, 12, 12


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
    ids, weights = route(x, weight, bias, how)
    assert weights.dtype == torch.float32
    for token, want in enumerate(true_route(x, weight, bias, how)):
        assert ids[token].tolist() == list(want)
        assert weights[token].tolist() == pytest.approx(list(want.values()), rel=1e-6)


def test_the_bias_moves_the_choice_but_not_the_weights() -> None:
    x, weight = torch.zeros(1, HIDDEN), torch.zeros(EXPERTS, HIDDEN, dtype=torch.float64)
    bias = torch.zeros(EXPERTS)
    bias[[2, 7, 9]] = torch.tensor([0.5, 5.0, 1.0])
    ids, weights = route(x, weight, bias, rule(normalize=False))
    assert ids.tolist() == [[7, 9, 2]]
    assert weights.tolist() == [[0.5, 0.5, 0.5]]


def test_ties_go_to_the_lower_expert_and_group() -> None:
    x, weight = normal(2, HIDDEN), torch.zeros(EXPERTS, HIDDEN, dtype=torch.float64)
    ids, _ = route(x, weight, torch.zeros(EXPERTS), rule())
    assert ids.tolist() == [[0, 1, 2]] * 2
    ids, _ = route(x, weight, torch.zeros(EXPERTS), rule(groups=3, top_groups=1))
    assert ids.tolist() == [[0, 1, 2]] * 2


def test_an_expert_of_a_lost_group_counts_as_zero_not_as_minus_infinity() -> None:
    """With negative choice scores in the best group, the zeros outside win."""
    weight = torch.zeros(4, HIDDEN, dtype=torch.float64)
    bias = torch.tensor([-0.6, -0.6, -3.0, -3.0])
    ids, _ = route(normal(1, HIDDEN), weight, bias, rule(top_k=2, groups=2, top_groups=1))
    assert ids.tolist() == [[2, 3]]


def test_scores_that_only_fp64_tells_apart() -> None:
    weight = torch.zeros(4, HIDDEN, dtype=torch.float64)
    weight[2, 0], weight[1, 0] = 1.0 + 1e-12, 1.0
    ids, _ = route(torch.ones(1, HIDDEN), weight, torch.zeros(4), rule(top_k=2))
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


@pytest.mark.parametrize("tokens", [1, 2, 3, 17])
@pytest.mark.parametrize("top_k", [1, 3, EXPERTS])
def test_experts_against_a_loop(tokens: int, top_k: int) -> None:
    x, (up, down), (ids, weights) = normal(tokens, HIDDEN), make_experts(), choose(tokens, top_k)
    want = torch.zeros(tokens, HIDDEN, dtype=torch.float64)
    for token in range(tokens):
        for expert, weight in zip(ids[token].tolist(), weights[token].tolist(), strict=True):
            inner = (up[expert].double() @ x[token].double()).clamp_min(0.0) ** 2
            want[token] += weight * (down[expert].double() @ inner)
    assert_relative_rms(experts(x, ids, weights, up, down), want, 1e-6)
    packed = [pack(one) for one in up], [pack(one) for one in down]
    assert_same_bits(experts(x, ids, weights, *packed), experts(x, ids, weights, up, down))


def test_experts_that_nobody_chose_are_not_read() -> None:
    up, down = make_experts()
    up[4:], down[4:] = float("nan"), float("nan")
    ids, weights = torch.tensor([[0, 3], [1, 0]]), torch.ones(2, 2)
    assert bool(torch.isfinite(experts(normal(2, HIDDEN), ids, weights, up, down)).all())


def test_rows_of_the_experts_are_independent() -> None:
    (up, down), (ids, weights) = make_experts(), choose(40)
    x = normal(40, HIDDEN)

    def run(rows: Tensor) -> Tensor:
        own = rows.long()
        return experts(x[own], ids[own], weights[own], up, down)

    assert_rows_are_independent(run, torch.arange(40.0))


def test_the_input_of_the_experts_is_only_read() -> None:
    x, (up, down), (ids, weights) = normal(5, HIDDEN), make_experts(), choose(5)
    before = x.clone()
    experts(x, ids, weights, up, down)
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
