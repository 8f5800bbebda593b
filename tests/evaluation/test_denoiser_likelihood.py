"""The denoiser's bound against the towers called one by one, and the estimator's masks."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence

import pytest
import torch

from twotower.evaluation.backend import Pair
from twotower.evaluation.denoiser_likelihood import (
    DenoiserLikelihood,
    Mask,
    block_key,
    drawn_masks,
    every_mask,
    masks_of,
)
from twotower.towers.errors import InvalidRequestError
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.model.denoiser_tower import DenoiserTower

Towers = tuple[ContextTower, DenoiserTower]
CONTEXT = [5, 17, 40, 9, 22]


@pytest.fixture(scope="module")
def towers(context_tower: ContextTower, denoiser_tower: DenoiserTower) -> Towers:
    return context_tower, denoiser_tower


def distribution(
    towers: Towers, before: Sequence[int], draft: Sequence[int], place: int
) -> torch.Tensor:
    """The log-probabilities [V] at one place of a draft, by a pass of its own, in fp64."""
    context, denoiser = towers
    state = context.new_state(len(before))
    context.forward([before], [state])
    context.advance(state, len(before))
    mask = denoiser.config.mask_token_id
    time = list(draft).count(mask) / len(draft)
    logits = denoiser.logits(denoiser.forward([draft], [time], [state]))[place].double()
    logits[mask] = -math.inf
    return torch.log_softmax(logits, -1)


def position_log_prob(
    towers: Towers, before: Sequence[int], draft: Sequence[int], place: int, token: int
) -> float:
    return float(distribution(towers, before, draft, place)[token])


def mean_over_orders(
    towers: Towers, before: Sequence[int], block: Sequence[int], size: int
) -> float:
    """The mean, over all orders, of the chain rule in that order; the block's rest is masked."""
    mask = towers[1].config.mask_token_id
    orders = list(itertools.permutations(range(len(block))))
    total = 0.0
    for order in orders:
        draft = [mask] * size
        for place in order:
            total += position_log_prob(towers, before, draft, place, block[place])
            draft[place] = block[place]
    return total / len(orders)


@pytest.mark.parametrize(("length", "size"), [(1, 1), (2, 2), (2, 4), (3, 3)])
def test_all_masks_give_the_mean_over_all_orders(towers: Towers, length: int, size: int) -> None:
    block = [11, 30, 7][:length]
    scorer = DenoiserLikelihood(*towers, samples=2**length - 1, block_size=size)
    [found] = scorer.bounds([Pair(CONTEXT, block)])
    assert found.log_prob == pytest.approx(mean_over_orders(towers, CONTEXT, block, size), abs=2e-4)
    assert found.nfe == 2**length - 1


def test_blocks_follow_the_clean_blocks_before_them(towers: Towers) -> None:
    text = [11, 30, 7, 7, 50]
    scorer = DenoiserLikelihood(*towers, samples=3, block_size=2)
    [found] = scorer.bounds([Pair(CONTEXT, text)])
    parts = [(CONTEXT, text[:2]), (CONTEXT + text[:2], text[2:4]), (CONTEXT + text[:4], text[4:])]
    want = sum(mean_over_orders(towers, before, block, 2) for before, block in parts)
    assert found.log_prob == pytest.approx(want, abs=5e-4)
    assert found.nfe == 3 + 3 + 1


def test_drawn_masks_weigh_the_towers_passes(towers: Towers) -> None:
    block, mask = [11, 30, 7, 19], towers[1].config.mask_token_id
    scorer = DenoiserLikelihood(*towers, samples=5, block_size=4, seed=3)
    [found] = scorer.bounds([Pair(CONTEXT, block)])
    want = 0.0
    for drawn in drawn_masks(4, 5, block_key(3, CONTEXT), len(CONTEXT)):
        draft = [mask if at in drawn.offsets else token for at, token in enumerate(block)]
        want += drawn.weight * sum(
            position_log_prob(towers, CONTEXT, draft, at, block[at]) for at in drawn.offsets
        )
    assert found.log_prob == pytest.approx(want, abs=2e-4)


def test_greedy_is_what_every_mask_finds_most_probable(towers: Towers) -> None:
    mask = towers[1].config.mask_token_id
    first = int(distribution(towers, CONTEXT, [mask, mask], 0).argmax())
    scorer = DenoiserLikelihood(*towers, samples=3, block_size=2)
    others = [int(distribution(towers, CONTEXT, [mask, mask], 1).argmax()), 11, 30]
    pairs = [Pair(CONTEXT, [first]), Pair(CONTEXT, [first + 1])]
    pairs += [Pair(CONTEXT, [first, other]) for other in others]
    greedy = [found.is_greedy for found in scorer.bounds(pairs)]
    assert greedy[:2] == [True, False]
    for found, (_, other) in zip(
        greedy[2:], [pair.continuation for pair in pairs[2:]], strict=True
    ):
        drafts = [([mask, mask], 0), ([mask, mask], 1), ([mask, other], 0), ([first, mask], 1)]
        best = [int(distribution(towers, CONTEXT, *draft).argmax()) for draft in drafts]
        assert found == (best == [first, other, first, other])


def test_a_row_gets_in_a_batch_what_it_gets_alone(towers: Towers) -> None:
    pairs = [
        Pair(CONTEXT, [11, 30, 7, 19, 8, 8, 9]),
        Pair([9] * 70, [4]),
        Pair([8], [13] * 18),
        Pair(CONTEXT, []),
    ]
    scorer = DenoiserLikelihood(*towers, samples=6, block_size=4)
    together = scorer.bounds(pairs)
    assert together == [found for pair in pairs for found in scorer.bounds([pair])]
    assert together == list(reversed(scorer.bounds(pairs[::-1])))
    assert together[-1].log_prob == 0.0


def test_the_weights_of_all_masks_add_up_to_the_expectation() -> None:
    masks = every_mask(3)
    assert len(masks) == 7
    # One position masked: l = 1 has probability 1/3, each set 1/3 of it, and the weight L / l = 3.
    assert masks[0] == Mask((0,), pytest.approx(1 / 3))
    assert masks[-1] == Mask((0, 1, 2), pytest.approx(1 / 3))
    # Each position's log-probabilities have the weight of one token.
    for place in range(3):
        weights = [mask.weight for mask in masks if place in mask.offsets]
        assert sum(weights) == pytest.approx(1.0)


def test_few_masks_are_all_taken_and_many_are_drawn() -> None:
    assert masks_of(3, 7, 1, 0) == every_mask(3)
    drawn = masks_of(3, 6, 1, 0)
    assert len(drawn) == 6
    assert len(masks_of(200, 32, 1, 0)) == 32


def estimates(samples: int, count: int) -> tuple[list[float], float]:
    """Estimates with `count` keys of an invented sum per mask, and its expectation."""
    values = {mask.offsets: -math.sin(7.0 * sum(mask.offsets)) - 2.0 for mask in every_mask(5)}
    exact = sum(mask.weight * values[mask.offsets] for mask in every_mask(5))
    found = [
        sum(mask.weight * values[mask.offsets] for mask in drawn_masks(5, samples, key << 32, key))
        for key in range(1, count + 1)
    ]
    return found, exact


def test_drawn_masks_are_right_on_average_and_converge() -> None:
    few, exact = estimates(2, 500)
    error = statistics.stdev(few) / math.sqrt(len(few))
    assert abs(statistics.fmean(few) - exact) < 4 * error
    many, _ = estimates(50, 40)

    def spread(found: Sequence[float]) -> float:
        return math.sqrt(statistics.fmean((one - exact) ** 2 for one in found))

    assert spread(many) < spread(few) / 4


def test_drawn_numbers_of_masks_are_spread_over_the_block() -> None:
    counts = sorted(len(mask.offsets) for mask in drawn_masks(8, 16, 12345, 40))
    assert counts == sorted([*range(1, 9)] * 2)
    firsts = {len(drawn_masks(8, 1, key, 0)[0].offsets) for key in range(1, 100)}
    assert firsts == set(range(1, 9))


@pytest.mark.parametrize(
    ("settings", "text"),
    [({"samples": 0}, "samples: got 0"), ({"block_size": 257}, "block_size: got 257")],
)
def test_numbers_have_limits(towers: Towers, settings: dict[str, int], text: str) -> None:
    with pytest.raises(InvalidRequestError, match=text):
        DenoiserLikelihood(*towers, **settings)
