"""What checked drafts yield and cost, against hand calculation."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from twotower.planner.checked import cycle_speed, lookup_speed
from twotower.planner.devices import DEVICES
from twotower.planner.drafts import CYCLE_TOKENS, KNOWN, LOOKUP_TOKENS, accept_rate, yielded
from twotower.planner.estimates import Estimate
from twotower.planner.measured import MeasuredPasses
from twotower.planner.passes import Passes
from twotower.planner.plan import Plan, make_plan
from twotower.planner.question import Question
from twotower.planner.schedules import BLOCK
from twotower.planner.shapes import LARGE
from twotower.planner.text import to_text

MODEL = Passes(LARGE, DEVICES["h200"].ceilings(), 4096, fp8=False)


def measured(**more: Any) -> Passes:
    """An AR step and a check of a block of 8 rows that take twice and four times as long as
    modelled."""
    seconds: dict[Any, Any] = {
        "ar": [(8.0, 2 * MODEL.ar(8))],
        "verify": [(8.0, 4 * MODEL.verify(8))],
    }
    return replace(MODEL, measured=MeasuredPasses("a test", 4096, seconds, **more))


def test_a_pass_yields_its_own_token_and_the_accepted_ones() -> None:
    assert yielded(0.5, 1) == 1.0
    assert yielded(0.5, 4) == 1 + 0.5 + 0.25 + 0.125
    assert yielded(1.0, BLOCK) == BLOCK


@pytest.mark.parametrize(("tokens", "rate"), [(1.0, 0.0), (2.0 - 2.0**-15, 0.5), (16.0, 1.0)])
def test_the_chance_of_a_token_from_what_a_round_yields(tokens: float, rate: float) -> None:
    assert accept_rate(tokens) == pytest.approx(rate, abs=1e-4)


def test_a_check_costs_by_its_tokens() -> None:
    known = measured()
    assert known.check(8, 1) == pytest.approx(known.ar(8)) == pytest.approx(2 * MODEL.ar(8))
    assert known.check(8, BLOCK) == pytest.approx(known.verify(8))
    # Four of sixteen tokens are half of the way on a logarithm: three times the model.
    half = MODEL.check(8, 4)
    assert known.check(8, 4) == pytest.approx(3 * half)
    assert MODEL.ar(8) < half < MODEL.verify(8)


def test_lookups_are_as_long_as_pays_most() -> None:
    speed = lookup_speed(MODEL, 8, 0.0)
    for tokens in (1.2, 3.0, 8.0):
        rate = accept_rate(tokens)
        expected = max(
            8 * (1 - rate**length) / (1 - rate) / MODEL.check(8, length) for length in (2, 4, 8, 16)
        )
        assert speed(tokens) == pytest.approx(expected)
    # All drafted tokens accepted: whole blocks.
    assert speed(16.0) == pytest.approx(8 * 16 / MODEL.verify(8))


def test_prompts_are_read_for_every_token_of_output() -> None:
    """3 tokens of 2 rows take a second and 6 halves of one."""
    assert cycle_speed(1.0, 2, 3.0, 0.5) == pytest.approx(6 / 4)
    alone, with_prompts = (lookup_speed(MODEL, 8, prompt)(16.0) for prompt in (0.0, 0.01))
    assert 1 / with_prompts == pytest.approx(1 / alone + 0.01)


def found(plan: Plan, name: str) -> Estimate:
    (own,) = [own for own in plan.estimates if (own.name, own.experts) == (name, "full")]
    return own


def test_a_plan_has_lookups_and_checked_drafts() -> None:
    question = Question("h200", batch=8, experts=("full",), most_denoisers=1)
    plan = make_plan(replace(question, lookup_tokens=4.0, cycle_tokens=5.0))
    ar, lookups = found(plan, "AR"), found(plan, "AR with lookups")
    assert lookups.memory == ar.memory
    assert (lookups.denoisers, lookups.gpus) == (0, 1)
    assert lookups.over_ar == pytest.approx(lookups.tokens_per_s / ar.tokens_per_s)
    assert lookups.over_ar > 1.0
    cycle = found(plan, "verified, colocated")
    seconds = (plan.passes[0].expected_ms["denoise"] + 1e3 * MODEL.verify(8)) / 1e3
    assert cycle.tokens_per_s == pytest.approx(8 * 5 / seconds)
    assert cycle.break_even == pytest.approx(seconds * ar.tokens_per_s / 8)
    assert found(plan, "verified, 1:1").gpus == 2
    text = to_text(plan)
    assert f"{lookups.break_even:.2f} tokens a round" in text
    assert f"{cycle.break_even:.2f} tokens a cycle" in text
    # The number of denoisers a context tower is one of diffusion.
    assert plan.denoisers["full"] == 1
    again = make_plan(replace(question, lookup_tokens=lookups.break_even or math.nan))
    assert found(again, "AR with lookups").over_ar == pytest.approx(1.0)


def test_lookups_are_never_slower_than_ar() -> None:
    """Where a draft does not pay, a round is an AR step."""
    plan = make_plan(Question("h200", batch=8, experts=("full",), lookup_tokens=1.0))
    assert found(plan, "AR with lookups").over_ar == 1.0


def test_defaults_are_said_to_be_assumed() -> None:
    assert pytest.approx(min(own.tokens for own in KNOWN), abs=0.05) == LOOKUP_TOKENS
    assert CYCLE_TOKENS in [own.tokens for own in KNOWN if own.drafter == "denoiser"]
    basis = {own.name: own.basis for own in make_plan(Question("h200")).inputs}
    assert (basis["lookups"], basis["checked drafts"]) == ("assumed", "assumed")
    given = make_plan(Question("h200", lookup_tokens=2.0, cycle_tokens=5.0))
    basis = {own.name: own.basis for own in given.inputs}
    assert (basis["lookups"], basis["checked drafts"]) == ("given", "given")
