"""Relaxed acceptance by scores that are written down, and by the formula."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.support.comparing import normal
from twotower.kernels.philox import uniforms
from twotower.towers.decoding.acceptance import (
    NUM_SCORES,
    Checked,
    MixedDraft,
    ScoreLines,
    check_draft,
)
from twotower.towers.decoding.sampling import Draw, Drawn, Sampler, draw_tokens
from twotower.towers.decoding.services import Block, DraftScores
from twotower.towers.errors import NumericalError

GREEDY = Sampler(0.0, None, None, None, key=5)
INF = float("inf")
VOCAB = 50


def test_only_a_mix_of_1_does_without_scores() -> None:
    assert MixedDraft([4], None, 1.0).scores is None
    with pytest.raises(ValueError, match=r"draft scores: got none, .* at a mix of 0\.99"):
        MixedDraft([4], None, 0.99)


def scores_of(*lines: dict[int, float]) -> DraftScores:
    """Scores by token, the largest first."""
    ranked = [sorted(line.items(), key=lambda pair: -pair[1]) for line in lines]
    ids = [[token for token, _ in line] for line in ranked]
    values = [[value for _, value in line] for line in ranked]
    return DraftScores(torch.tensor(ids), torch.tensor(values))


def check(
    probabilities: Sequence[float],
    scores: dict[int, float],
    mix: float,
    how: Sampler = GREEDY,
    token: int = 1,
) -> Checked:
    """One drafted token, which the context tower gives these probabilities; then one of its own."""
    logits = torch.log(torch.tensor([probabilities, probabilities]))
    draft = MixedDraft([token], scores_of(scores), mix)
    checked = check_draft(logits, Draw(how, [7, 8]), draft)
    assert isinstance(checked, Checked)
    return checked


def logs(*probabilities: float) -> dict[int, float]:
    return {token: math.log(p) if p else -INF for token, p in enumerate(probabilities)}


@pytest.mark.parametrize(
    ("mix", "accepted"),
    # .3 ln .1 + .7 ln .5 = -1.18 is less than .3 ln .7 + .7 ln .4 = -.75; at .05 it is -.77 and
    # more than -.89. They are equal at ln(.5/.4) / (ln(.5/.4) + ln(.7/.1)) = .1029.
    [(0.05, False), (0.10, False), (0.11, True), (0.3, True), (1.0, True)],
)
def test_a_draft_that_is_not_the_own_token(mix: float, accepted: bool) -> None:
    checked = check([0.5, 0.4, 0.05, 0.05], logs(0.1, 0.7, 0.1, 0.1), mix)
    assert checked.accepted == [accepted]
    assert checked.own.token_ids == [0, 0]
    assert checked.num_accepted == accepted


def test_both_tokens_have_the_context_towers_probabilities() -> None:
    how = replace(GREEDY, top_logprobs=2)
    checked = check([0.5, 0.4, 0.05, 0.05], logs(0.1, 0.7, 0.1, 0.1), 0.3, how)
    assert checked.drafted.token_ids == [1]
    assert checked.drafted.confidences == pytest.approx([0.4])
    assert checked.drafted.log_probs == pytest.approx([math.log(0.4)])
    assert checked.own.confidences == pytest.approx([0.5, 0.5])
    assert checked.drafted.top_log_probs == checked.own.top_log_probs[:1]
    assert [token for token, _ in checked.drafted.top_log_probs[0]] == [0, 1]


def test_probabilities_are_untempered_and_unfiltered() -> None:
    how = Sampler(0.25, 2, None, None, key=3, logit_bias=((1, 5.0),))
    checked = check([0.5, 0.4, 0.05, 0.05], logs(0.1, 0.7, 0.1, 0.1), 1.0, how)
    assert checked.drafted.confidences == pytest.approx([0.4])


@pytest.mark.parametrize(
    ("mix", "accepted"), [(0.49, False), (0.5, True), (0.51, True), (1.0, True)]
)
def test_a_tie_is_the_drafts(mix: float, accepted: bool) -> None:
    own = torch.log_softmax(torch.log(torch.tensor([0.6, 0.2, 0.1, 0.1])), dim=-1).tolist()
    mirrored = {0: own[1], 1: own[0], 2: own[2], 3: own[3]}
    assert check([0.6, 0.2, 0.1, 0.1], mirrored, mix).accepted == [accepted]


@pytest.mark.parametrize(
    # Token 3 is not among the scores. With -2.5 it has .3 * -2.5 + .7 ln .6 = -1.11, less than
    # .3 * -.2 + .7 ln .3 = -.90; with -.3 it has -.45.
    ("least", "accepted"),
    [(-2.5, True), (-0.3, False)],
)
def test_a_token_without_a_score_has_the_smallest(least: float, accepted: bool) -> None:
    checked = check([0.05, 0.3, 0.05, 0.6], {1: -0.2, 0: least}, 0.3)
    assert checked.accepted == [accepted]


@pytest.mark.parametrize("mix", [1e-300, 1e-40, 0.3, 1 - 1e-16])
def test_what_the_context_tower_filters_out_is_rejected(mix: float) -> None:
    # Nothing is left that both would draw.
    how = Sampler(1.0, 1, None, None, key=3)
    checked = check([0.5, 0.4, 0.05, 0.05], logs(0, 1, 0, 0), mix, how)
    assert checked.accepted == [False]
    assert checked.own.token_ids == [0, 0]


def test_all_is_accepted_without_looking() -> None:
    how = Sampler(1.0, 1, None, None, key=3)
    assert check([0.5, 0.4, 0.05, 0.05], logs(0, 1, 0, 0), 1.0, how).accepted == [True]


def test_what_the_denoiser_filters_out_cannot_stand_in_the_way() -> None:
    # Token 0 would be far ahead: .01 ln .1 + .99 ln .88 against .99 ln .1.
    own = [0.88, 0.1, 0.01, 0.01]
    assert check(own, logs(0, 1, 0, 0), 0.01).accepted == [True]
    assert check(own, logs(0.1, 0.9, 0, 0), 0.01).accepted == [False]


def test_what_comes_after_a_rejection_does_not_count() -> None:
    logits = torch.log(torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.6, 0.4], [0.5, 0.5]]))
    sure = {1: math.log(0.8), 0: math.log(0.2)}
    draft = MixedDraft([1, 1, 1], scores_of(sure, sure, sure), 0.5)
    checked = check_draft(logits, Draw(GREEDY, range(4)), draft)
    assert isinstance(checked, Checked)
    assert checked.accepted == [True, False, True]
    assert checked.num_accepted == 1


SAMPLERS = {
    "greedy": GREEDY,
    "sampled": Sampler(0.8, None, None, None, key=11),
    "filtered": Sampler(1.3, 20, 0.9, 0.02, key=12),
    "shifted": Sampler(1.0, None, None, None, key=13, logit_bias=((4, 3.0), (9, -2.0))),
    "penalized": replace(GREEDY, frequency_penalty=1.5, presence_penalty=0.5),
}


def by_hand(logits: Tensor, how: Sampler, position: int, output: Sequence[int]) -> Tensor:
    """Scores [V] of a position in fp64, for samplers without filters."""
    scores = logits.double().clone()
    for token, bias in how.logit_bias:
        scores[token] += bias
    for token in range(len(scores)):
        count = list(output).count(token)
        scores[token] -= how.frequency_penalty * count + how.presence_penalty * (count > 0)
    if how.temperature == 0:
        return torch.log_softmax(scores, dim=-1)
    counter = [torch.tensor([number]) for number in (how.key, position, 0, 2)]
    noise = -torch.log(-torch.log(uniforms(*counter, len(scores))[0].double()))
    return torch.log_softmax(scores / how.temperature, dim=-1) + noise


def drafted_by(logits: Tensor, draw: Draw, count: int = VOCAB) -> tuple[list[int], DraftScores]:
    drawn = draw_tokens(logits, [replace(draw, num_scores=count)])[0]
    assert isinstance(drawn, Drawn)
    assert drawn.draft_scores is not None
    return drawn.token_ids, drawn.draft_scores


@pytest.mark.parametrize("name", ["greedy", "sampled", "shifted", "penalized"])
@pytest.mark.parametrize("mix", [0.1, 0.3, 0.7])
def test_the_formula(name: str, mix: float) -> None:
    how, output = SAMPLERS[name], [3, 3, 8]
    theirs, own = normal(60, VOCAB, seed=1), normal(61, VOCAB, seed=2)
    # Towers that agree now and then, as real ones do.
    theirs, own = theirs + 2 * normal(60, VOCAB, seed=3), own.clone()
    own[:60] += 2 * normal(60, VOCAB, seed=3)
    positions = range(100, 161)
    tokens, scores = drafted_by(theirs, Draw(how, positions[:-1], output=output))
    checked = check_draft(own, Draw(how, positions, output=output), MixedDraft(tokens, scores, mix))
    assert isinstance(checked, Checked)
    relaxed = 0
    for line, token in enumerate(tokens):
        a = by_hand(theirs[line], how, positions[line], output)
        c = by_hand(own[line], how, positions[line], output)
        target = mix * a + (1 - mix) * c
        assert token == int(a.argmax())
        assert checked.own.token_ids[line] == int(c.argmax())
        assert checked.accepted[line] == (int(target.argmax()) == token), line
        relaxed += checked.accepted[line] and token != int(c.argmax())
    # The case has all kinds of positions.
    assert 0 < relaxed < sum(checked.accepted) < 60


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_more_of_the_denoiser_accepts_more(name: str) -> None:
    """A target is linear in the ratio, and the draft is the best at one end."""
    how = SAMPLERS[name]
    theirs, own = normal(40, VOCAB, seed=4), normal(41, VOCAB, seed=5)
    tokens, scores = drafted_by(theirs, Draw(how, range(40)), 8)
    own_tokens = draw_tokens(own, [Draw(how, range(41))])[0]
    assert isinstance(own_tokens, Drawn)
    before = [token == other for token, other in zip(tokens, own_tokens.token_ids, strict=False)]
    for mix in (1e-6, 0.2, 0.5, 0.9, 1.0):
        checked = check_draft(own, Draw(how, range(41)), MixedDraft(tokens, scores, mix))
        assert isinstance(checked, Checked)
        assert checked.own == own_tokens
        assert all(now or not then for now, then in zip(checked.accepted, before, strict=True))
        before = checked.accepted
    assert all(before)


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_asking_for_scores_changes_no_token(name: str) -> None:
    how, logits = SAMPLERS[name], normal(30, VOCAB, seed=6)
    draw = Draw(replace(how, top_logprobs=3), range(30), excluded_token=2, output=[3, 3, 8])
    plain = draw_tokens(logits, [draw])[0]
    scored = draw_tokens(logits, [replace(draw, num_scores=5)])[0]
    assert isinstance(scored, Drawn)
    assert scored == plain
    assert scored.draft_scores is not None
    assert scored.draft_scores.token_ids.shape == (30, 5)
    assert scored.draft_scores.token_ids[:, 0].tolist() == scored.token_ids
    values = scored.draft_scores.scores
    assert bool((values[:, 1:] <= values[:, :-1]).all())


def test_greedy_scores_are_normalised() -> None:
    logits = normal(4, VOCAB, seed=8) + 100
    _, scores = drafted_by(logits, Draw(GREEDY, range(4), excluded_token=2))
    assert torch.exp(scores.scores).sum(-1).tolist() == pytest.approx([1.0] * 4, abs=1e-5)
    assert scores.token_ids[:, -1].tolist() == [2] * 4
    assert scores.scores[:, -1].tolist() == [-INF] * 4


def test_of_equal_logits_the_drawn_one_is_first() -> None:
    """Greedy draws take the lowest id; scores are rounded and must not put another one first."""
    logits = torch.zeros(1, 200)
    logits[0, 150] = 1e-7  # lost beside the normaliser
    tokens, scores = drafted_by(logits, Draw(GREEDY, [0]), NUM_SCORES)
    assert tokens == [150]
    assert scores.token_ids[0].tolist() == [150, *range(NUM_SCORES - 1)]


def test_non_finite_logits_are_the_error_of_their_row() -> None:
    logits = normal(2, VOCAB)
    scores = scores_of({1: -0.1, 2: -2.0})
    for bad in (float("nan"), INF):
        wrong = logits.clone()
        wrong[1, 3] = bad
        error = check_draft(wrong, Draw(GREEDY, [7, 8]), MixedDraft([1], scores, 0.3))
        assert isinstance(error, NumericalError)
        both = draw_tokens(
            torch.cat([wrong, logits]),
            [Draw(GREEDY, [7, 8], num_scores=4), Draw(GREEDY, [7, 8], num_scores=4)],
        )
        assert isinstance(both[0], NumericalError)
        assert isinstance(both[1], Drawn)


def test_scores_of_another_draft_are_refused() -> None:
    with pytest.raises(ValueError, match=r"draft scores: .* expected 2 lines"):
        MixedDraft([1, 2], scores_of({1: -0.1, 2: -2.0}), 0.3)


def test_a_token_keeps_the_scores_of_its_step() -> None:
    lines = ScoreLines()
    assert lines.whole() is None
    first = scores_of({1: -1.0}, {2: -2.0}, {3: -3.0})
    lines.keep([4, 5, 6], [5], first)
    lines.keep([4, 6], [6, 4], scores_of({7: -7.0}, {8: -8.0}))
    whole = lines.whole()
    assert whole is not None
    assert whole.token_ids.tolist() == [[7], [2], [8]]
    assert whole.scores.tolist() == [[-7.0], [-2.0], [-8.0]]


def test_a_draft_is_small_on_the_wire() -> None:
    """Also where its scores are lines of a larger whole."""
    lines = ScoreLines()
    for step in range(16):
        masked = list(range(step, 16))
        _, scores = drafted_by(normal(len(masked), 1000, seed=step), Draw(GREEDY, masked), 64)
        lines.keep(masked, [step], scores)
    block = Block(0, (1,) * 16, (0,) * 16, (0.5,) * 16, 1, log_probs=(-0.1,) * 16)
    message = pickle.dumps(replace(block, draft_scores=lines.whole()))
    assert len(message) < 20_000
    back = pickle.loads(message).draft_scores
    assert back.token_ids.shape == back.scores.shape == (16, 64)
