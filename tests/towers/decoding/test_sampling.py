"""Draws: filters by hand, frequencies by chi-square, noise by its key."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.comparing import assert_rows_are_independent, normal
from tests.support.statistics import chi_square
from twotower.kernels.philox import uniforms
from twotower.towers.decoding.alternatives import most_probable
from twotower.towers.decoding.sampling import (
    DOMAIN_AUTOREGRESSIVE,
    DOMAIN_DENOISE,
    Draw,
    Drawn,
    Sampler,
    draw_scores,
    draw_tokens,
    signed,
)
from twotower.towers.errors import NumericalError
from twotower.towers.request.params import GenerationParams, row_key

# Probabilities 0.4, 0.3, 0.2, 0.1, out of order.
LOGITS = torch.log(torch.tensor([[0.2, 0.4, 0.1, 0.3]]))
GREEDY = Sampler(0.0, None, None, None, key=1)


def sampler(
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    key: int = 1,
) -> Sampler:
    return Sampler(temperature, top_k, top_p, min_p, key)


def probabilities(logits: Tensor, how: Sampler, excluded: int | None = None) -> list[float]:
    return torch.exp(scores_of(logits, how, excluded))[0].tolist()


def scores_of(logits: Tensor, how: Sampler, excluded: int | None = None) -> Tensor:
    """The scores of lines at neighbouring positions."""
    positions = range(len(logits))
    return draw_scores(logits, Draw(how, positions, excluded_token=excluded))


@pytest.mark.parametrize(
    ("how", "want"),
    [
        (sampler(), [0.2, 0.4, 0.1, 0.3]),
        (sampler(top_k=1), [0, 1, 0, 0]),
        (sampler(top_k=2), [0, 4 / 7, 0, 3 / 7]),
        (sampler(top_k=99), [0.2, 0.4, 0.1, 0.3]),
        (sampler(top_p=0.01), [0, 1, 0, 0]),
        (sampler(top_p=0.39), [0, 1, 0, 0]),
        (sampler(top_p=0.5), [0, 4 / 7, 0, 3 / 7]),
        (sampler(top_p=0.75), [2 / 9, 4 / 9, 0, 3 / 9]),
        (sampler(top_p=1.0), [0.2, 0.4, 0.1, 0.3]),
        # Of what top-k left and renormalised: 4/7 exceeds 0.5 already.
        (sampler(top_k=2, top_p=0.5), [0, 1, 0, 0]),
        (sampler(min_p=0.0), [0.2, 0.4, 0.1, 0.3]),
        (sampler(min_p=0.45), [0.2, 0.4, 0, 0.3]),
        (sampler(min_p=1.0), [0, 0.4, 0, 0]),
        (sampler(temperature=0.5), [4 / 30, 16 / 30, 1 / 30, 9 / 30]),
        # The temperature comes first: 16/30 exceeds 0.5 already.
        (sampler(temperature=0.5, top_p=0.5), [0, 1, 0, 0]),
    ],
)
def test_filters_by_hand(how: Sampler, want: list[float]) -> None:
    got = probabilities(LOGITS, how)
    total = sum(got)  # min-p comes last and leaves the rest as it is
    assert [value / total for value in got] == pytest.approx(
        [w / sum(want) for w in want], abs=1e-6
    )


def test_ties_of_the_kth_are_kept_and_those_of_top_p_fall_from_the_right() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 1.0]])
    assert [p > 0 for p in probabilities(logits, sampler(top_k=2))] == [True] * 4
    flat = torch.zeros(1, 4)
    assert [p > 0 for p in probabilities(flat, sampler(top_p=0.3))] == [True, True, False, False]
    # Only what exceeds p counts: half is not more than half.
    assert [p > 0 for p in probabilities(flat, sampler(top_p=0.5))] == [True, True, True, False]


def drawn_without(
    excluded: int | None,
    how: Sampler,
    logits: Tensor,
    positions: Sequence[int],
    step: int,
    domain: int,
) -> Drawn:
    drawn = draw_tokens(logits, [Draw(how, positions, step, domain, excluded)])[0]
    assert isinstance(drawn, Drawn)
    return drawn


def test_the_excluded_token_takes_no_part() -> None:
    assert probabilities(LOGITS, sampler(), excluded=1) == pytest.approx([1 / 3, 0, 1 / 6, 1 / 2])
    assert probabilities(LOGITS, sampler(top_k=1), excluded=1) == [0, 0, 0, 1]
    got = probabilities(LOGITS, sampler(min_p=0.5), excluded=1)
    assert [p > 0 for p in got] == [True, False, False, True]


def test_a_top_p_of_one_keeps_the_whole_tail() -> None:
    """The running sum of very many probabilities rounds to more than 1 before its end."""
    logits = torch.zeros(1, 131_072)
    logits[:, -100:] = -20.0
    assert bool(torch.isfinite(scores_of(logits, sampler(top_p=1.0))).all())


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-40, 5e-324])
def test_a_tiny_temperature_is_nearly_greedy_and_never_nan(temperature: float) -> None:
    logits = normal(30, 50, scale=30.0)
    how = sampler(temperature=temperature)
    assert not bool(scores_of(logits, how, 3).isnan().any())
    tokens = drawn_without(3, how, logits, list(range(30)), 0, DOMAIN_DENOISE).token_ids
    assert tokens == drawn_without(3, GREEDY, logits, list(range(30)), 0, DOMAIN_DENOISE).token_ids


def test_a_huge_temperature_is_uniform() -> None:
    got = probabilities(LOGITS, sampler(temperature=1e30))
    assert got == pytest.approx([0.25] * 4)


def test_rows_of_the_scores_are_independent() -> None:
    how = sampler(0.7, top_k=40, top_p=0.9, min_p=0.01)
    assert_rows_are_independent(lambda x: scores_of(x, how, 3), normal(40, 515, scale=3.0))


@pytest.mark.parametrize(
    ("how", "excluded"),
    [
        (sampler(), None),
        (sampler(key=2**64 - 1), 3),
        (sampler(0.6), None),
        (sampler(1.7, top_k=5), 3),
        (sampler(top_p=0.8), None),
        (sampler(min_p=0.2), None),
    ],
)
def test_frequencies_are_those_of_the_softmax(how: Sampler, excluded: int | None) -> None:
    logits = normal(1, 12, seed=8, scale=1.5)
    wide = logits[0].double()
    if excluded is not None:
        wide[excluded] = -math.inf
    want = torch.softmax(wide / how.temperature, dim=-1)
    if how.top_k is not None:
        want[want < want.sort(descending=True).values[how.top_k - 1]] = 0
    if how.top_p is not None:
        order = want.argsort(descending=True)
        before = want[order].cumsum(0) - want[order]
        want[order[before > how.top_p]] = 0
    if how.min_p is not None:
        want[want < how.min_p * want.max()] = 0
    positions = list(range(20_000))
    drawn = drawn_without(
        excluded, how, logits.expand(20_000, -1), positions, 4, DOMAIN_AUTOREGRESSIVE
    )
    assert chi_square(drawn.token_ids, want / want.sum()) > 1e-3


def test_successive_draws_are_independent() -> None:
    """Pairs of neighbouring positions, and of a position at two steps."""
    how, logits = sampler(), torch.zeros(20_000, 4)
    positions = list(range(20_000))
    tokens = how.draw(logits, positions, 0, DOMAIN_DENOISE).token_ids
    again = how.draw(logits, positions, 1, DOMAIN_DENOISE).token_ids
    flat = torch.full((16,), 1 / 16)
    assert (
        chi_square([a * 4 + b for a, b in zip(tokens[::2], tokens[1::2], strict=True)], flat) > 1e-3
    )
    assert chi_square([a * 4 + b for a, b in zip(tokens, again, strict=True)], flat) > 1e-3


def test_a_draw_depends_on_its_key_position_step_and_domain_only() -> None:
    logits = normal(40, 100)
    how = sampler()
    drawn = drawn_without(3, how, logits, list(range(40)), 2, DOMAIN_DENOISE)
    for i in (0, 13, 39):
        alone = drawn_without(3, how, logits[i : i + 1], [i], 2, DOMAIN_DENOISE)
        assert alone == Drawn([drawn.token_ids[i]], [drawn.confidences[i]], [drawn.log_probs[i]])
    others = [
        drawn_without(3, sampler(key=2), logits, list(range(40)), 2, DOMAIN_DENOISE),
        drawn_without(3, how, logits, list(range(1, 41)), 2, DOMAIN_DENOISE),
        drawn_without(3, how, logits, list(range(40)), 3, DOMAIN_DENOISE),
        drawn_without(3, how, logits, list(range(40)), 2, DOMAIN_AUTOREGRESSIVE),
    ]
    for other in others:
        same = zip(other.token_ids, drawn.token_ids, strict=True)
        assert sum(a == b for a, b in same) < 12


def test_the_noise_is_that_of_the_rows_key() -> None:
    logits = normal(3, 20)
    how = Sampler.from_params(GenerationParams(temperature=1.0, seed=77))
    assert how.key == row_key(77)
    noise = -torch.log(-torch.log(uniforms(row_key(77), torch.tensor([5, 6, 9]), 1, 2, 20)))
    want = (torch.log_softmax(logits, dim=-1) + noise).argmax(-1).tolist()
    assert how.draw(logits, [5, 6, 9], 1, DOMAIN_AUTOREGRESSIVE).token_ids == want


def test_the_confidence_is_untempered_and_unfiltered() -> None:
    logits = normal(50, 20)
    want = torch.softmax(logits.double(), dim=-1)
    drawn = sampler(2.0, top_k=3).draw(logits, list(range(50)), 0, DOMAIN_DENOISE)
    chosen = want.gather(1, torch.tensor(drawn.token_ids)[:, None])[:, 0]
    assert drawn.confidences == pytest.approx(chosen.tolist(), rel=1e-5)
    assert drawn.log_probs == pytest.approx(chosen.log().tolist(), rel=1e-5)


@pytest.mark.parametrize("how", [GREEDY, sampler(), sampler(0.5, top_k=3, top_p=0.5, min_p=0.1)])
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_an_error(how: Sampler, wrong: float) -> None:
    logits = normal(4, 9)
    logits[2, 5] = wrong
    with pytest.raises(NumericalError, match="non-finite logits at position 30, step 6"):
        how.draw(logits, [30, 31, 32, 33], 6, DOMAIN_DENOISE)


def mixed_draws() -> list[Draw]:
    """Rows of every kind: greedy, drawn, filtered, with tokens left out or barred."""
    barred = {"eos_token_id": 4, "eos_from": 12}
    return [
        Draw(GREEDY, [0, 1, 2], 0, DOMAIN_DENOISE, 3),
        Draw(sampler(key=2**64 - 1), [7], 5, DOMAIN_AUTOREGRESSIVE),
        Draw(sampler(0.7, top_k=5, top_p=0.9), [10, 11, 12, 13], 2, DOMAIN_DENOISE, 3),
        Draw(replace(sampler(1.3, key=9), **barred), [10, 11, 12, 13], 1, DOMAIN_DENOISE, 3),
        Draw(sampler(min_p=0.1, key=5), [0, 5], 0, DOMAIN_AUTOREGRESSIVE),
        Draw(replace(GREEDY, **barred), [11, 40], 3, DOMAIN_DENOISE),
        Draw(replace(sampler(top_k=3, key=8), **barred), [3, 40], 3, DOMAIN_DENOISE, 3),
        Draw(sampler(key=2), [7], 5, DOMAIN_AUTOREGRESSIVE),
    ]


@pytest.mark.parametrize("which", ["all", "plain", "filtered"])
def test_draws_of_any_kind_together_are_those_alone(which: str) -> None:
    draws = mixed_draws()
    if which != "all":
        draws = [draw for draw in draws if draw.sampler.filtered == (which == "filtered")]
    logits = normal(sum(len(draw.positions) for draw in draws), 60, scale=3.0)
    together = draw_tokens(logits, draws)
    assert len(together) == len(draws)
    start = 0
    for draw, got in zip(draws, together, strict=True):
        own = logits[start : start + len(draw.positions)]
        start += len(draw.positions)
        # Equal floats, not close ones: confidences are compared with thresholds.
        assert got == draw_tokens(own, [draw])[0]
        assert isinstance(got, Drawn)
        if draw.excluded_token is None:
            assert got == draw.sampler.draw(own, draw.positions, draw.step, draw.domain)
        for line, position in enumerate(draw.positions):
            single = draw_tokens(own[line : line + 1], [replace(draw, positions=[position])])[0]
            assert isinstance(single, Drawn)
            assert (single.token_ids[0], single.log_probs[0]) == (
                got.token_ids[line],
                got.log_probs[line],
            )


@pytest.mark.parametrize("spoiled", range(8))
def test_a_row_that_is_not_finite_fails_alone_among_draws(spoiled: int) -> None:
    draws = mixed_draws()
    starts = [sum(len(draw.positions) for draw in draws[:index]) for index in range(9)]
    logits = normal(starts[-1], 60, scale=3.0)
    want = draw_tokens(logits, draws)
    logits[starts[spoiled + 1] - 1, 9] = math.nan
    got = draw_tokens(logits, draws)
    error = got[spoiled]
    assert isinstance(error, NumericalError)
    where = f"position {draws[spoiled].positions[0]}, step {draws[spoiled].step}"
    assert str(error) == f"non-finite logits at {where}"
    assert got[:spoiled] + got[spoiled + 1 :] == want[:spoiled] + want[spoiled + 1 :]


def test_no_draws_give_nothing() -> None:
    assert draw_tokens(torch.empty(0, 9), []) == []


@pytest.mark.parametrize("key", [0, 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_key_keeps_its_64_bits_in_a_tensor(key: int) -> None:
    assert signed(key) % 2**64 == key
    assert int(torch.tensor([signed(key)])) == signed(key)


EOS, EOS_FROM = 4, 10_000


def without_eos(how: Sampler) -> Sampler:
    """The same draw with EOS kept out below EOS_FROM."""
    return replace(how, eos_token_id=EOS, eos_from=EOS_FROM)


@pytest.mark.parametrize(
    "how", [GREEDY, sampler(), sampler(0.5, top_k=1), sampler(top_k=4, top_p=0.9, min_p=0.05)]
)
def test_eos_comes_from_its_position_on_only(how: Sampler) -> None:
    """Before it, the draw is that of a vocabulary in which EOS is impossible."""
    logits = normal(60, 12, scale=0.5)
    logits[:, EOS] = 3.0
    positions = list(range(EOS_FROM - 30, EOS_FROM + 30))
    plain = drawn_without(3, how, logits, positions, 2, DOMAIN_DENOISE)
    drawn = drawn_without(3, without_eos(how), logits, positions, 2, DOMAIN_DENOISE)
    assert drawn.token_ids[30:] == plain.token_ids[30:]
    assert EOS in drawn.token_ids[30:]
    impossible = logits.clone()
    impossible[:, EOS] = -1e30
    want = drawn_without(3, how, impossible, positions, 2, DOMAIN_DENOISE)
    assert drawn.token_ids[:30] == want.token_ids[:30]
    assert EOS not in drawn.token_ids[:30]
    # What is reported is the tower's own probability, in which EOS has its share.
    wide = logits.double()
    wide[:, 3] = -math.inf
    own = torch.log_softmax(wide, dim=-1).gather(1, torch.tensor(drawn.token_ids)[:, None])[:, 0]
    assert drawn.log_probs == pytest.approx(own.tolist(), rel=1e-5)
    assert drawn.confidences == pytest.approx(own.exp().tolist(), rel=1e-5)


@pytest.mark.parametrize("how", [sampler(), sampler(1.7, top_k=5), sampler(0.8, top_p=0.8)])
def test_frequencies_without_eos(how: Sampler) -> None:
    """The filters count what is left: top-k keeps k tokens besides EOS."""
    logits = normal(1, 12, seed=8, scale=1.5)
    logits[0, EOS] = float(logits.max()) + 0.5
    wide = logits[0].double()
    wide[EOS] = -math.inf
    want = torch.softmax(wide / how.temperature, dim=-1)
    if how.top_k is not None:
        want[want < want.sort(descending=True).values[how.top_k - 1]] = 0
    if how.top_p is not None:
        order = want.argsort(descending=True)
        before = want[order].cumsum(0) - want[order]
        want[order[before > how.top_p]] = 0
    rows = logits.expand(EOS_FROM, -1)
    drawn = without_eos(how).draw(rows, list(range(EOS_FROM)), 0, DOMAIN_AUTOREGRESSIVE)
    assert chi_square(drawn.token_ids, want / want.sum()) > 1e-3


def test_a_row_without_eos_is_drawn_as_ever() -> None:
    params = GenerationParams(temperature=1.0, seed=3, min_tokens=9).for_prompt(100)
    assert Sampler.from_params(params).eos_from == 109
    logits = normal(20, 12)
    positions = list(range(100, 120))
    drawn = Sampler.from_params(params).draw(logits, positions, 0, DOMAIN_AUTOREGRESSIVE)
    plain = Sampler.from_params(replace(params, eos_from=0))
    assert drawn == plain.draw(logits, positions, 0, DOMAIN_AUTOREGRESSIVE)


# Token 0 to 3; of an output 1, 1, 3 the second token's count is 2.
FOUR = torch.tensor([[1.0, 2.0, 0.5, 1.5]])
SHIFTED = replace(
    GREEDY, frequency_penalty=0.5, presence_penalty=0.25, logit_bias=((0, -1.0), (2, 1.0))
)


def test_bias_and_penalties_by_hand() -> None:
    lines = FOUR.repeat(3, 1)
    draw = Draw(SHIFTED, range(3), output=[1, 1, 3], drafted=[[], [2], [2, 2, 0]])
    assert draw_scores(lines, draw).tolist() == [
        # 1 - 1; 2 - 2 * 0.5 - 0.25; 0.5 + 1; 1.5 - 0.5 - 0.25
        [0.0, 0.75, 1.5, 0.75],
        [0.0, 0.75, 1.5 - 0.75, 0.75],
        [0.0 - 0.75, 0.75, 1.5 - 1.25, 0.75],
    ]
    drawn = draw_tokens(lines, [draw])[0]
    assert isinstance(drawn, Drawn)
    # Of equals the lowest id.
    assert drawn.token_ids == [2, 1, 1]
    # What the model thinks of them, as if nothing had been shifted.
    want = torch.log_softmax(FOUR[0], dim=-1)[[2, 1, 1]]
    assert drawn.log_probs == pytest.approx(want.tolist(), abs=1e-6)
    assert drawn.confidences == pytest.approx(want.exp().tolist(), abs=1e-6)


def test_negative_penalties_favour_what_was_said() -> None:
    how = replace(GREEDY, frequency_penalty=-1.0)
    assert how.draw(FOUR, [0], 0, DOMAIN_DENOISE, [2, 2]).token_ids == [2]
    assert how.draw(FOUR, [0], 0, DOMAIN_DENOISE).token_ids == [1]


def test_bias_comes_before_temperature_and_filters() -> None:
    # exp(2 * (2 - 2)) : exp(2 * 1.5) of the tokens that top-k leaves.
    how = replace(sampler(temperature=0.5, top_k=2), logit_bias=((1, -2.0),))
    got = probabilities(FOUR, how)
    share = math.exp(2 * 1.5) / (math.exp(2 * 1.5) + math.exp(2 * 1.0))
    assert got == pytest.approx([1 - share, 0, 0, share], abs=1e-6)


def test_no_bias_gives_a_token_that_may_not_be_drawn() -> None:
    how = replace(GREEDY, logit_bias=((1, 100.0), (3, 100.0)), eos_token_id=3, eos_from=5)
    drawn = draw_tokens(FOUR.repeat(2, 1), [Draw(how, [4, 5], excluded_token=1)])[0]
    assert isinstance(drawn, Drawn)
    assert drawn.token_ids == [0, 3]


def test_neighbours_of_a_shifted_draw_keep_their_bits() -> None:
    logits = normal(12, 515, scale=3.0)
    others = [sampler(0.8), GREEDY, sampler(1.0, top_p=0.9, key=5)]
    plain = [Draw(how, range(4 * i, 4 * i + 3)) for i, how in enumerate(others)]
    strange = Draw(replace(SHIFTED, top_logprobs=3), [90, 91, 92], output=[4, 4])
    alone = [draw_tokens(logits[3 * i : 3 * i + 3], [draw])[0] for i, draw in enumerate(plain)]
    mixed = torch.cat([logits[:3], logits[9:], logits[3:9]])
    got = draw_tokens(mixed, [plain[0], strange, *plain[1:]])
    assert [got[0], *got[2:]] == alone
    assert got[1] == draw_tokens(logits[9:], [strange])[0]


@pytest.mark.parametrize("count", [1, 5, 20])
@pytest.mark.parametrize("excluded", [None, 7])
def test_alternatives_are_the_most_probable(count: int, excluded: int | None) -> None:
    logits = normal(6, 300, scale=3.0)
    how = replace(sampler(1.0), top_logprobs=count, logit_bias=((3, 5.0),))
    drawn = draw_tokens(logits, [Draw(how, range(6), excluded_token=excluded)])[0]
    assert isinstance(drawn, Drawn)
    wide = logits.double()
    if excluded is not None:
        wide[:, excluded] = -math.inf
    values, ids = torch.log_softmax(wide, dim=-1).topk(count)
    assert [[token for token, _ in line] for line in drawn.top_log_probs] == ids.tolist()
    got = torch.tensor([[value for _, value in line] for line in drawn.top_log_probs])
    torch.testing.assert_close(got, values.float(), atol=1e-5, rtol=0)
    for token, value, line in zip(
        drawn.token_ids, drawn.log_probs, drawn.top_log_probs, strict=True
    ):
        # One distribution: where the token is among them, it has its own number.
        assert dict(line).get(token, value) == value


def test_of_equal_alternatives_the_lowest_ids_come_first() -> None:
    logits = torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0, 2.0, 0.0]])
    for count, want in ((1, [5]), (2, [5, 1]), (4, [5, 1, 3, 0]), (6, [5, 1, 3, 0, 2, 4])):
        (line,) = most_probable(logits, count)
        assert [token for token, _ in line] == want
    (line,) = most_probable(torch.tensor([[0.0, -math.inf, 1.0]]), 20)
    assert [token for token, _ in line] == [2, 0]


def test_alternatives_of_logits_that_are_not_finite_are_an_error() -> None:
    how = replace(GREEDY, top_logprobs=2)
    logits = torch.tensor([[0.0, math.nan, 1.0], [0.0, 1.0, 2.0]])
    broken, fine = draw_tokens(logits, [Draw(how, [0]), Draw(how, [1])])
    assert isinstance(broken, NumericalError)
    assert isinstance(fine, Drawn)
    assert [token for token, _ in fine.top_log_probs[0]] == [2, 1]


def test_which_draws_a_device_makes_alone() -> None:
    assert GREEDY.plain
    assert sampler(0.7).plain
    shifts: list[dict[str, Any]] = [{"presence_penalty": 0.1}, {"frequency_penalty": -0.1}]
    shifts += [{"logit_bias": ((1, 0.0),)}, {"top_logprobs": 1}, {"temperature": 1.0, "top_k": 3}]
    for shift in shifts:
        assert not replace(GREEDY, **shift).plain
