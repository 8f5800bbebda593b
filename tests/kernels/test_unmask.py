"""From logits to tokens and confidences, by hand-written cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.comparing import assert_rows_are_independent, assert_same_bits, normal
from twotower.kernels.unmask import first_argmax, predict


def test_the_confidence_is_the_softmax_of_the_predicted_token() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 9.0], [0.0, -1.0, 5.0, 0.5]])
    tokens, confidences, _, finite = predict(logits, None)
    assert tokens.tolist() == [3, 2]
    assert finite.tolist() == [True, True]
    for row, token, got in zip(logits.tolist(), tokens.tolist(), confidences.tolist(), strict=True):
        want = math.exp(row[token]) / sum(math.exp(value) for value in row)
        assert got == pytest.approx(want, rel=1e-6)


def test_the_excluded_token_is_neither_predicted_nor_counted() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 9.0]])
    tokens, confidences, _, _ = predict(logits, 3)
    assert tokens.tolist() == [1]
    want = math.exp(3.0) / (math.exp(1.0) + math.exp(3.0) + math.exp(2.0))
    assert confidences.tolist() == pytest.approx([want], rel=1e-6)
    assert logits[0, 3] == 9.0


def test_ties_go_to_the_lowest_id() -> None:
    logits = torch.tensor([[0.0, 7.0, 7.0, 7.0], [5.0, 5.0, 5.0, 5.0], [1.0, 0.0, 2.0, 2.0]])
    assert predict(logits, None)[0].tolist() == [1, 0, 2]
    assert predict(logits, 0)[0].tolist() == [1, 1, 2]
    assert first_argmax(logits.repeat(1, 50)).tolist() == [1, 0, 2]


def test_a_certain_token_has_confidence_one_and_never_more() -> None:
    logits = torch.cat((torch.full((1, 1), 90.0), normal(1, 5000)), dim=1)
    assert predict(logits, None)[1].tolist() == [1.0]
    many = normal(300, 50, scale=20.0)
    assert float(predict(many, None)[1].max()) <= 1.0


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 3, 6])
def test_a_row_with_a_non_finite_logit_is_reported_and_harms_no_other(
    wrong: float, place: int
) -> None:
    logits = normal(4, 7)
    clean = predict(logits, 3)
    logits[2, place] = wrong
    tokens, confidences, _, finite = predict(logits, 3)
    assert finite.tolist() == [True, True, False, True]
    others = [0, 1, 3]
    assert_same_bits(tokens[others], clean[0][others])
    assert_same_bits(confidences[others], clean[1][others])


def test_a_draw_adds_gumbel_noise_to_the_scores() -> None:
    logits, uniform = normal(40, 11), torch.rand(40, 11, generator=torch.Generator().manual_seed(1))
    scores = torch.log_softmax(logits / 0.7, dim=-1)
    tokens, confidences, _, _ = predict(logits, None, scores, uniform)
    for row in range(40):
        noisy = [
            float(s) - math.log(-math.log(float(u)))
            for s, u in zip(scores[row], uniform[row], strict=True)
        ]
        assert tokens[row] == noisy.index(max(noisy))
    # Untempered, whatever the scores of the draw.
    untempered = torch.softmax(logits.double(), dim=-1).gather(1, tokens[:, None])[:, 0]
    assert torch.allclose(confidences.double(), untempered, rtol=1e-5)


def test_what_is_filtered_out_is_never_drawn() -> None:
    scores = torch.full((1, 9), float("-inf"))
    scores[0, 4] = math.log(1e-6)
    uniform = torch.full((1, 9), 1.0 - 2.0**-24)
    uniform[0, 4] = 2.0**-24
    assert predict(normal(1, 9), None, scores, uniform)[0].tolist() == [4]


def test_extreme_uniforms_are_safe() -> None:
    uniform = torch.tensor([[0.0, 1.0 - 2.0**-24, 0.5]])
    tokens, confidences, _, finite = predict(torch.zeros(1, 3), None, torch.zeros(1, 3), uniform)
    assert tokens.tolist() == [1]
    assert bool(torch.isfinite(confidences).all())
    assert finite.tolist() == [True]


def test_rows_are_independent() -> None:
    uniform = torch.rand(40, 515, generator=torch.Generator().manual_seed(1))
    rows = torch.cat((normal(40, 515, scale=5.0), uniform), dim=1)
    for part in (0, 1, 2):

        def greedy(x: Tensor, part: int = part) -> Tensor:
            return predict(x[:, :515], 3)[part]

        def drawn(x: Tensor, part: int = part) -> Tensor:
            return predict(x[:, :515], None, x[:, :515], x[:, 515:])[part]

        assert_rows_are_independent(greedy, rows)
        assert_rows_are_independent(drawn, rows)


def test_bf16_logits_tie_in_order() -> None:
    logits = torch.tensor([[19.96, 20.0, 20.02, 3.0]]).bfloat16()
    tokens, confidences, _, _ = predict(logits, None)
    assert tokens.tolist() == [0]
    assert confidences.tolist() == pytest.approx([1 / 3], rel=1e-5)


def test_the_log_probability_is_exact_near_zero_and_far_below() -> None:
    """Against fp64; the log of an fp32 confidence would be off, or minus infinity."""
    logits = torch.tensor([[0.0, 12.0, -3.0], [0.0, 0.0, 0.0]])
    want = torch.log_softmax(logits.double(), dim=-1)
    tokens, _, log_probs, _ = predict(logits, None)
    assert tokens.tolist() == [1, 0]
    assert log_probs.tolist() == pytest.approx([want[0, 1].item(), want[1, 0].item()], abs=2e-6)
    assert log_probs[0] < 0.0
    improbable = torch.full((1, 3), float("-inf"))
    improbable[0, 2] = 0.0
    cold = torch.tensor([[0.0, 200.0, 0.0]])
    drawn = predict(cold, None, improbable, torch.full((1, 3), 0.5))
    assert (drawn[0].tolist(), drawn[1].tolist(), drawn[2].tolist()) == ([2], [0.0], [-200.0])


def test_a_barred_token_is_counted_but_not_predicted_where_it_is_barred() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 9.0]]).repeat(3, 1)
    barred = torch.tensor([True, False, True])
    tokens, confidences, log_probs, finite = predict(logits, 1, barred_token=3, barred=barred)
    assert (tokens.tolist(), finite.tolist()) == ([2, 3, 2], [True] * 3)
    total = sum(math.exp(value) for value in (1.0, 2.0, 9.0))
    want = [math.exp(2.0) / total, math.exp(9.0) / total, math.exp(2.0) / total]
    assert confidences.tolist() == pytest.approx(want, rel=1e-5)
    assert log_probs.tolist() == pytest.approx([math.log(value) for value in want], abs=2e-6)
    uniform = torch.full((3, 4), 0.5)
    drawn = predict(logits, 1, torch.log_softmax(logits, -1), uniform, 3, barred)[0]
    assert drawn.tolist() == [1, 3, 1]
    assert logits[0, 3] == 9.0


def test_barring_nowhere_changes_no_bit() -> None:
    logits = normal(20, 50, scale=4.0)
    nowhere = torch.zeros(20, dtype=torch.bool)
    for plain, barred in zip(
        predict(logits, 3), predict(logits, 3, barred_token=5, barred=nowhere), strict=True
    ):
        assert_same_bits(plain, barred)
