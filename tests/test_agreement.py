"""How far two checkpoints agree, on outputs written by hand and on a model and itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from twotower import GenerationResult, TwoTower
from twotower.agreement import Cost, agreement, common_prefix, compare
from twotower.towers.checkpoint.quantization import quantize_checkpoint
from twotower.towers.request.params import GenerationParams


def result(token_ids: Sequence[int], nfe: int) -> GenerationResult:
    return GenerationResult(list(token_ids), "", "length", nfe, 0, 0, [], None, 0, 0, 0, [])


@pytest.mark.parametrize(
    ("one", "other", "want"),
    [
        ([1, 2, 3], [1, 2, 3], 3),
        ([1, 2, 3], [1, 9, 3], 1),
        ([1, 2, 3], [1, 2], 2),
        ([1, 2], [1, 2, 3], 2),
        ([1], [2], 0),
        ([], [2], 0),
    ],
)
def test_tokens_before_the_first_difference(one: list[int], other: list[int], want: int) -> None:
    assert common_prefix(one, other) == want


def test_figures_of_two_outputs() -> None:
    before = [result([1, 2, 3, 4], 2), result([5, 6], 2)]
    after = [result([1, 2, 9, 4], 4), result([5, 6], 2)]
    got = agreement("mask_diffusion", before, after)
    assert (got.prompts, got.equal_outputs) == (2, 1)
    assert got.equal_share == pytest.approx(4 / 6)
    assert got.before == Cost(6, 4, 1.5)
    assert got.after == Cost(6, 6, 1.0)
    assert agreement("ar", [result([1], 0)], [result([1], 0)]).before == Cost(1, 0, None)


def test_a_model_agrees_with_itself_and_less_with_its_quantized_self(
    tiny_a: Path, tmp_path: Path
) -> None:
    prompts = [[5, 9, 11], [7, 7, 30, 4, 12]]
    params = GenerationParams(max_tokens=32)
    same = compare(tiny_a, tiny_a, prompts, params=params)
    diffusion, ar = same.modes
    assert (diffusion.mode, ar.mode) == ("mask_diffusion", "ar")
    for mode in same.modes:
        assert (mode.prompts, mode.equal_outputs, mode.equal_share) == (2, 2, 1.0)
        assert mode.before == mode.after
        assert mode.before.tokens == 64
    assert diffusion.before.nfe > 0 == ar.before.nfe
    model = TwoTower.from_pretrained(tiny_a)
    scores = [score for prompt in prompts for score in model.score(prompt)]
    assert same.loss_before == same.loss_after == pytest.approx(-sum(scores) / 6)
    quantize_checkpoint(tiny_a, tmp_path / "quantized")
    other = compare(tiny_a, tmp_path / "quantized", prompts, params=params)
    assert other.loss_before == same.loss_before
    assert other.loss_after != other.loss_before
    assert all(mode.equal_share < 1.0 for mode in other.modes)
