"""From logits to tokens and confidences, by hand-written cases."""

from __future__ import annotations

import math
from dataclasses import astuple, fields
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.comparing import assert_rows_are_independent, assert_same_bits, normal
from twotower.kernels.philox import uniforms
from twotower.kernels.unmask import SamplingBatch, first_argmax, gumbel, predict, tempered, without

Predicted = tuple[Tensor, Tensor, Tensor, Tensor]


def sampling_batch(count: int, **values: Any) -> SamplingBatch:
    """Greedy lines without a token to leave out, but for what is given: of each or of all."""
    defaults = {"temperature": 0.0, "key": 1, "position": 0, "step": 0, "domain": 1}
    known = {**defaults, "excluded": -1, "barred": -1, **values}

    def line(name: str) -> Tensor:
        dtype = torch.float32 if name == "temperature" else torch.int64
        return torch.as_tensor(known[name], dtype=dtype).expand(count).contiguous()

    return SamplingBatch(**{name: line(name) for name in known})


def greedy(logits: Tensor, **values: Any) -> Predicted:
    return predict(logits, sampling_batch(len(logits), **values))


def with_noise(logits: Tensor, scores: Tensor, uniform: Tensor, **values: Any) -> Predicted:
    """A draw by hand: the scores with the noise of these numbers, taken as they are."""
    return predict(logits, sampling_batch(len(logits), **values), scores + gumbel(uniform))


def test_the_confidence_is_the_softmax_of_the_predicted_token() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 9.0], [0.0, -1.0, 5.0, 0.5]])
    tokens, confidences, _, finite = greedy(logits)
    assert tokens.tolist() == [3, 2]
    assert finite.tolist() == [True, True]
    for row, token, got in zip(logits.tolist(), tokens.tolist(), confidences.tolist(), strict=True):
        want = math.exp(row[token]) / sum(math.exp(value) for value in row)
        assert got == pytest.approx(want, rel=1e-6)


def test_the_excluded_token_is_neither_predicted_nor_counted() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 9.0]])
    tokens, confidences, _, _ = greedy(logits, excluded=3)
    assert tokens.tolist() == [1]
    want = math.exp(3.0) / (math.exp(1.0) + math.exp(3.0) + math.exp(2.0))
    assert confidences.tolist() == pytest.approx([want], rel=1e-6)
    assert logits[0, 3] == 9.0


def test_ties_go_to_the_lowest_id() -> None:
    logits = torch.tensor([[0.0, 7.0, 7.0, 7.0], [5.0, 5.0, 5.0, 5.0], [1.0, 0.0, 2.0, 2.0]])
    assert greedy(logits)[0].tolist() == [1, 0, 2]
    assert greedy(logits, excluded=0)[0].tolist() == [1, 1, 2]
    assert first_argmax(logits.repeat(1, 50)).tolist() == [1, 0, 2]


def test_a_certain_token_has_confidence_one_and_never_more() -> None:
    logits = torch.cat((torch.full((1, 1), 90.0), normal(1, 5000)), dim=1)
    assert greedy(logits)[1].tolist() == [1.0]
    many = normal(300, 50, scale=20.0)
    assert float(greedy(many)[1].max()) <= 1.0


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 3, 6])
def test_a_row_with_a_non_finite_logit_is_reported_and_harms_no_other(
    wrong: float, place: int
) -> None:
    logits = normal(4, 7)
    clean = greedy(logits, excluded=3)
    logits[2, place] = wrong
    tokens, confidences, _, finite = greedy(logits, excluded=3)
    assert finite.tolist() == [True, True, False, True]
    others = [0, 1, 3]
    assert_same_bits(tokens[others], clean[0][others])
    assert_same_bits(confidences[others], clean[1][others])


def test_a_draw_adds_gumbel_noise_to_the_scores() -> None:
    logits, uniform = normal(40, 11), torch.rand(40, 11, generator=torch.Generator().manual_seed(1))
    scores = torch.log_softmax(logits / 0.7, dim=-1)
    tokens, confidences, _, _ = with_noise(logits, scores, uniform)
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
    assert with_noise(normal(1, 9), scores, uniform)[0].tolist() == [4]


def test_extreme_uniforms_are_safe() -> None:
    uniform = torch.tensor([[0.0, 1.0 - 2.0**-24, 0.5]])
    tokens, confidences, _, finite = with_noise(torch.zeros(1, 3), torch.zeros(1, 3), uniform)
    assert tokens.tolist() == [1]
    assert bool(torch.isfinite(confidences).all())
    assert finite.tolist() == [True]


def test_rows_are_independent() -> None:
    uniform = torch.rand(40, 515, generator=torch.Generator().manual_seed(1))
    numbers = torch.arange(40.0).unsqueeze(1)
    rows = torch.cat((normal(40, 515, scale=5.0), uniform, numbers), dim=1)
    for part in (0, 1, 2):

        def best(x: Tensor, part: int = part) -> Tensor:
            return greedy(x[:, :515], excluded=3)[part]

        def scored(x: Tensor, part: int = part) -> Tensor:
            return with_noise(x[:, :515], x[:, :515], x[:, 515:-1])[part]

        def drawn(x: Tensor, part: int = part) -> Tensor:
            """Every third line greedy, each with a key, position and step of its own."""
            number = x[:, -1].long()
            temperature = (number % 3).float() * 0.7
            own = sampling_batch(
                len(x), temperature=temperature, key=number, position=7 * number, step=number
            )
            return predict(x[:, :515], own)[part]

        for operator in (best, scored, drawn):
            assert_rows_are_independent(operator, rows)


def test_bf16_logits_tie_in_order() -> None:
    logits = torch.tensor([[19.96, 20.0, 20.02, 3.0]]).bfloat16()
    tokens, confidences, _, _ = greedy(logits)
    assert tokens.tolist() == [0]
    assert confidences.tolist() == pytest.approx([1 / 3], rel=1e-5)


def test_the_log_probability_is_exact_near_zero_and_far_below() -> None:
    """Against fp64; the log of an fp32 confidence would be off, or minus infinity."""
    logits = torch.tensor([[0.0, 12.0, -3.0], [0.0, 0.0, 0.0]])
    want = torch.log_softmax(logits.double(), dim=-1)
    tokens, _, log_probs, _ = greedy(logits)
    assert tokens.tolist() == [1, 0]
    assert log_probs.tolist() == pytest.approx([want[0, 1].item(), want[1, 0].item()], abs=2e-6)
    assert log_probs[0] < 0.0
    improbable = torch.full((1, 3), float("-inf"))
    improbable[0, 2] = 0.0
    cold = torch.tensor([[0.0, 200.0, 0.0]])
    drawn = with_noise(cold, improbable, torch.full((1, 3), 0.5))
    assert (drawn[0].tolist(), drawn[1].tolist(), drawn[2].tolist()) == ([2], [0.0], [-200.0])


def test_a_barred_token_is_counted_but_not_predicted_where_it_is_barred() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 9.0]]).repeat(3, 1)
    barred = [3, -1, 3]
    tokens, confidences, log_probs, finite = greedy(logits, excluded=1, barred=barred)
    assert (tokens.tolist(), finite.tolist()) == ([2, 3, 2], [True] * 3)
    total = sum(math.exp(value) for value in (1.0, 2.0, 9.0))
    want = [math.exp(2.0) / total, math.exp(9.0) / total, math.exp(2.0) / total]
    assert confidences.tolist() == pytest.approx(want, rel=1e-5)
    assert log_probs.tolist() == pytest.approx([math.log(value) for value in want], abs=2e-6)
    uniform = torch.full((3, 4), 0.5)
    drawn = with_noise(logits, torch.log_softmax(logits, -1), uniform, barred=barred)[0]
    assert drawn.tolist() == [1, 3, 1]
    assert logits[0, 3] == 9.0
    # With noise of its own a line is drawn among what is left.
    many = logits[:1].repeat(400, 1)
    own = {"temperature": 5.0, "position": torch.arange(400)}
    assert set(greedy(many, **own)[0].tolist()) == {0, 1, 2, 3}
    assert set(greedy(many, **own, barred=3)[0].tolist()) == {0, 1, 2}
    assert set(greedy(many, **own, barred=3, excluded=1)[0].tolist()) == {0, 2}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_barring_nowhere_changes_no_bit(temperature: float) -> None:
    logits = normal(20, 50, scale=4.0)
    own = {"temperature": temperature, "excluded": 3, "position": torch.arange(20)}
    plain = greedy(logits, **own)
    # Of another line a token is barred; its neighbours keep theirs.
    barred = greedy(logits, **own, barred=[5 if line == 7 else -1 for line in range(20)])
    others = [line for line in range(20) if line != 7]
    for left, right in zip(plain, barred, strict=True):
        assert_same_bits(left[others], right[others])


def mixed_lines(count: int) -> SamplingBatch:
    """Lines that differ in everything: each field has another period."""
    line = torch.arange(count)
    return sampling_batch(
        count,
        temperature=torch.tensor([0.0, 1.0, 0.3, 1e-20, 7.0])[line % 5],
        key=torch.tensor([5, -1, 2**62 + 9])[line % 3],
        position=line * 1000 % 77,
        step=line % 4,
        domain=1 + line % 2,
        excluded=torch.tensor([-1, 3, 11, 3, -1, 0, 5])[line % 7],
        barred=torch.tensor([2, -1, -1, 9, 1, -1])[line % 6],
    )


@pytest.mark.parametrize("with_scores", [False, True])
def test_lines_of_any_kind_share_a_call(with_scores: bool) -> None:
    """Bit by bit what each line gives alone."""
    logits, lines = normal(70, 90, scale=3.0), mixed_lines(70)
    # Of the scores a draw leaves out what the line leaves out.
    scores = without(normal(70, 90, seed=1), lines.excluded) if with_scores else None
    together = predict(logits, lines, scores)
    for line in range(70):
        own = slice(line, line + 1)
        single = SamplingBatch(
            *(getattr(lines, field.name)[own] for field in fields(SamplingBatch))
        )
        alone = predict(logits[own], single, None if scores is None else scores[own])
        for left, right in zip(together, alone, strict=True):
            assert_same_bits(left[own], right, line)
    taken = together[0]
    assert not bool(((taken == lines.excluded) | (taken == lines.barred)).any())


def test_noise_is_that_of_the_lines_key_position_step_and_domain() -> None:
    """A draw is the argmax of tempered scores and keyed noise, in fp64 by hand."""
    logits, lines = normal(70, 90, scale=3.0), mixed_lines(70)
    tokens, confidences, log_probs, _ = predict(logits, lines)
    untempered = without(logits.double(), lines.excluded)
    for line, (temperature, key, position, step, domain, _, barred) in enumerate(
        zip(*(part.tolist() for part in astuple(lines)), strict=True)
    ):
        scores = untempered[line]
        if temperature:
            drawn = uniforms(key, torch.tensor([position]), step, domain, 90)[0]
            scores = torch.log_softmax(scores / temperature, dim=-1) - (-drawn.double().log()).log()
        if barred >= 0:
            scores = scores.clone()
            scores[barred] = -math.inf
        assert int(tokens[line]) == int(scores.argmax()), line
    want = torch.log_softmax(untempered, dim=-1).gather(1, tokens[:, None])[:, 0]
    assert log_probs.tolist() == pytest.approx(want.tolist(), abs=1e-5)
    assert confidences.tolist() == pytest.approx(want.exp().tolist(), rel=1e-4)


def test_scores_to_draw_from_take_the_place_of_tempered_logits() -> None:
    logits, scores = normal(40, 11), torch.log_softmax(normal(40, 11, seed=1), dim=-1)
    own = sampling_batch(40, temperature=0.5, key=9, position=torch.arange(40), step=2)
    noise = gumbel(uniforms(9, torch.arange(40), 2, 1, 11))
    want = (scores + noise).argmax(-1)
    assert predict(logits, own, scores)[0].tolist() == want.tolist()
    # At temperature 0 they are taken as they are.
    assert (
        predict(logits, sampling_batch(40, key=9), scores)[0].tolist() == scores.argmax(-1).tolist()
    )


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 0.25, 1.0, 30.0])
def test_tempered_scores_are_log_probabilities(temperature: float) -> None:
    logits = normal(6, 20, scale=40.0)
    got = tempered(logits, torch.full((6,), temperature))
    assert not bool(got.isnan().any())
    wide = torch.log_softmax(logits.double() / max(temperature, 2.0**-126), dim=-1)
    likely = wide > -80.0
    assert torch.allclose(got.double()[likely], wide[likely], rtol=1e-4, atol=1e-4)
    assert bool((got[~likely] < -70.0).all())


def test_tokens_are_left_out_line_by_line() -> None:
    scores = normal(4, 6)
    before = scores.clone()
    got = without(scores, torch.tensor([2, -1, 0, 5]))
    gone = torch.zeros(4, 6, dtype=torch.bool)
    gone[0, 2] = gone[2, 0] = gone[3, 5] = True
    assert bool((got[gone] == float("-inf")).all())
    assert_same_bits(got[~gone], before[~gone])
    assert_same_bits(scores, before)


def test_no_lines_give_no_tokens() -> None:
    assert [part.shape for part in greedy(torch.empty(0, 9))] == [(0,)] * 4


def test_scores_cannot_bring_the_excluded_token_back() -> None:
    scores = torch.tensor([[0.0, 5.0, 0.0]])
    tokens, confidences, _, _ = predict(torch.zeros(1, 3), sampling_batch(1, excluded=1), scores)
    assert (tokens.tolist(), confidences.tolist()) == ([0], [0.5])
