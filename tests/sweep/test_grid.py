"""Which points a sweep has, and what their requests ask for."""

from __future__ import annotations

import pytest

from twotower.sweep.grid import STRATEGIES, Grid, Strategy
from twotower.towers.errors import InvalidRequestError
from twotower.towers.request.params import GenerationParams

BASE = GenerationParams(max_tokens=8)
AXES = {
    "confidence_threshold": (0.5, 0.9),
    "steps_per_block": (2, 8, 16),
    "block_size": (8, 32),
    "draft_steps": (1, 2),
}


def test_every_point_once_and_ar_first() -> None:
    names = [point.name for point in Grid(axes=AXES).points(BASE)]
    assert names == [
        "ar",
        "verified, block 8, drafts 1",
        "verified, block 8, drafts 2",
        "verified, block 32, drafts 1",
        "verified, block 32, drafts 2",
        "threshold, block 8, threshold 0.5",
        "threshold, block 8, threshold 0.9",
        "threshold, block 32, threshold 0.5",
        "threshold, block 32, threshold 0.9",
        "steps, block 8, steps 2",
        # 16 steps for 8 positions are 8.
        "steps, block 8, steps 8",
        "steps, block 32, steps 2",
        "steps, block 32, steps 8",
        "steps, block 32, steps 16",
    ]


def test_each_way_to_draft_and_each_commit_rule() -> None:
    grid = Grid(
        ("verified", "auto", "mask_diffusion"),
        ("lookup", "denoiser", "mix", "denoiser_mix", "released", "leftmost", "product"),
        {"mix_ratio": (0.3, 1.0), "quality": ("ar", "fast")},
    )
    found = {point.name: point.params(BASE) for point in grid.points(BASE)}
    assert found.pop("ar").mode == "ar"
    drafts = {
        name: (each.draft_source, each.acceptance, each.mix)
        for name, each in found.items()
        if each.mode == "verified"
    }
    assert drafts == {
        "verified, block 16, drafts 1": ("any", "strict", 0.0),
        "lookup, block 16": ("lookup", "strict", 0.0),
        "denoiser, block 16, drafts 1": ("denoiser", "strict", 0.0),
        "mix, block 16, mix 0.3": ("any", "mix", 0.3),
        "mix, block 16, mix 1": ("any", "mix", 1.0),
        "denoiser_mix, block 16, mix 0.3": ("denoiser", "mix", 0.3),
        "denoiser_mix, block 16, mix 1": ("denoiser", "mix", 1.0),
    }
    assert [each.quality for each in found.values() if each.mode == "auto"] == ["ar", "fast"]
    assert "auto, block 16, quality fast" in found
    rules = {
        name: (each.commit_rule, each.starts_with_context)
        for name, each in found.items()
        if each.mode == "mask_diffusion"
    }
    assert rules == {
        "released, block 16, threshold 0.8": ("released", False),
        "leftmost, block 16, threshold 0.8": ("leftmost", True),
        "product, block 16, threshold 0.8": ("product", True),
    }


def test_a_threshold_decides_alone_and_so_do_steps() -> None:
    points = {point.name: point.params(BASE) for point in Grid(axes=AXES).points(BASE)}
    by_threshold = points["threshold, block 32, threshold 0.9"]
    assert (by_threshold.mode, by_threshold.max_tokens) == ("mask_diffusion", 8)
    assert (by_threshold.confidence_threshold, by_threshold.steps_per_block) == (0.9, 32)
    by_steps = points["steps, block 32, steps 2"]
    assert (by_steps.confidence_threshold, by_steps.steps_per_block) == (1.0, 2)


def test_every_pair_of_threshold_and_steps_on_request() -> None:
    grid = Grid(("mask_diffusion",), ("threshold_steps",), AXES)
    points = [point for point in grid.points(BASE) if point.strategy == "threshold_steps"]
    chosen = {
        (each.block_size, each.confidence_threshold, each.steps_per_block)
        for each in (point.params(BASE) for point in points)
    }
    assert chosen == {
        (block, threshold, steps)
        for block, most in ((8, (2, 8)), (32, (2, 8, 16)))
        for threshold in (0.5, 0.9)
        for steps in most
    }


def test_ar_is_there_unasked_and_greedy_ar_beside_it_at_a_temperature() -> None:
    warm = GenerationParams(temperature=0.7)
    points = Grid(("mock_ar",), axes={}).points(warm)
    assert [point.name for point in points] == ["ar greedy", "ar", "mock_ar"]
    assert [point.params(warm).temperature for point in points] == [0.0, 0.7, 0.7]


def test_a_new_rule_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any parameter can be an axis."""
    line = Strategy("verified", {"draft_steps": 2}, ("min_p",))
    monkeypatch.setitem(STRATEGIES, "relaxed", line)
    monkeypatch.setattr("twotower.sweep.grid.CHOICES", ("relaxed",))
    grid = Grid(("verified",), ("relaxed",), {"min_p": (0.1, 0.3)})
    found = {point.name: point.params(BASE) for point in grid.points(BASE)}
    assert found["relaxed, min_p 0.3"].min_p == 0.3
    assert found["relaxed, min_p 0.3"].draft_steps == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"modes": ("auto",), "axes": {"quality": ("best",)}},
            "quality: got 'best', expected one of ar, near, fast",
        ),
        ({"modes": ("beam",)}, "modes: got 'beam', expected one of"),
        ({"strategies": ("luck",)}, "strategy: got 'luck', expected one of lookup, denoiser, mix"),
        ({"axes": {"block_size": ()}}, "block_size: got"),
        ({"axes": {"confidence_threshold": (1.5,)}}, "confidence_threshold: got 1.5"),
        ({"axes": {"block_size": (0,)}}, "block_size: got 0"),
        ({"axes": {"draft_steps": (0,)}}, "draft_steps: got 0"),
    ],
)
def test_what_a_request_may_not_have(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        Grid(**arguments).points(BASE)  # type: ignore[arg-type]
