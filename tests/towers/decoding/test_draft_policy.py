"""Which round is made next: by what drafts give and by what passes cost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from twotower.towers.decoding.draft_policy import (
    STEP,
    DraftExperience,
    DraftPolicy,
    LearningPolicy,
    Round,
    StaticPolicy,
    policy_of,
)
from twotower.towers.decoding.pass_times import PassTimes
from twotower.towers.decoding.services import DraftCosts, PassTime
from twotower.towers.request.params import GenerationParams

VERIFIED = GenerationParams(mode="verified", seed=1)
FREE, DEAR = DraftCosts(0.01, 0.1), DraftCosts(50.0, 500.0)


def times_of(step: float, check: float) -> PassTimes:
    """Passes of one row: seconds of a step and of a check of 16 tokens."""
    times = PassTimes()
    for _ in range(30):
        times.note(PassTime(step, 1, 1))
        times.note(PassTime(check, 16, 1))
    return times


def policy_with(
    times: PassTimes, params: GenerationParams = VERIFIED, *, with_denoiser: bool = True
) -> DraftPolicy:
    return policy_of(params, times, DraftExperience(), with_denoiser=with_denoiser)


def taught(policy: DraftPolicy, match: int, accepted: int, count: int = 15) -> DraftPolicy:
    """The policy after lookups of which so many tokens were accepted."""
    for _ in range(30):
        policy.learn(match, count, accepted)
    return policy


def test_without_a_match_there_is_a_step() -> None:
    assert policy_with(times_of(1.0, 1.2)).choose(0, 15, DEAR) == STEP


def test_lookups_that_hold_are_long() -> None:
    policy = taught(policy_with(times_of(1.0, 1.2)), 8, 15)
    assert policy.choose(8, 15, DEAR) == Round("lookup", 15)


def test_a_draft_is_no_longer_than_there_is_room() -> None:
    policy = taught(policy_with(times_of(1.0, 1.2)), 8, 15)
    assert policy.choose(8, 5, DEAR) == Round("lookup", 5)
    assert policy.choose(8, 0, DEAR) == STEP


def test_lookups_that_never_hold_are_left() -> None:
    policy = taught(policy_with(times_of(1.0, 4.0)), 1, 0)
    assert policy.choose(1, 15, DEAR) == STEP
    # Longer matches have not failed.
    assert policy.choose(8, 15, DEAR).drafted_by == "lookup"


def test_drafts_are_shorter_where_tokens_cost() -> None:
    chosen = [
        taught(policy_with(times_of(1.0, check)), 4, 2, count=3).choose(4, 15, DEAR).count
        for check in (1.0, 6.0, 40.0)
    ]
    assert chosen == sorted(chosen, reverse=True)
    assert chosen[0] == 15
    assert chosen[-1] < 3


def test_the_denoiser_drafts_where_it_pays() -> None:
    policy = policy_with(times_of(1.0, 1.2))
    for _ in range(20):
        policy.learn_draft("checked", 8, FREE)
    assert policy.choose(0, 15, FREE) == Round("denoiser", asks="checked")
    assert policy.choose(0, 15, DEAR) == STEP


def test_a_whole_block_is_asked_for_as_soon_as_a_pass_of_the_denoiser_is_known_to_be_cheap() -> (
    None
):
    params = replace(VERIFIED, mode="auto", quality="fast").resolved()
    policy = policy_with(times_of(1.0, 1.2), params)
    assert policy.choose(0, 15, DraftCosts()).asks != "whole"
    assert policy.choose(0, 15, DraftCosts(checked=0.1)).asks == "whole"
    assert policy.choose(0, 15, DraftCosts(checked=1.5)).asks != "whole"


def test_a_denoiser_whose_drafts_fail_is_left_though_it_costs_little() -> None:
    policy = policy_with(times_of(1.0, 1.2))
    for _ in range(20):
        policy.learn_draft("checked", 0, FREE)
    assert policy.choose(0, 15, FREE) == STEP


def test_lookups_that_give_much_leave_no_time_for_the_denoiser() -> None:
    # 3 tokens for 2.2 s: more than a step, less than what lookups give in that time.
    costs = DraftCosts(1.0)
    policy = policy_with(times_of(1.0, 1.2))
    for _ in range(20):
        policy.learn_draft("checked", 2, costs)
        policy.learn(0, 0, 0)
    assert policy.choose(0, 15, costs).asks == "checked"
    taught(policy, 8, 15)
    assert policy.choose(0, 15, costs) == STEP


def test_a_row_starts_from_what_other_rows_have_shown() -> None:
    times, experience = times_of(1.0, 4.0), DraftExperience()
    first = policy_of(VERIFIED, times, experience, with_denoiser=False)
    for _ in range(300):
        first.learn(1, 15, 0)
    again = policy_of(VERIFIED, times, experience, with_denoiser=False)
    assert again.choose(1, 15, DEAR) == STEP
    # Rows that are drawn, not greedy, have an experience of their own.
    drawn = replace(VERIFIED, temperature=0.7)
    assert policy_of(drawn, times, experience, with_denoiser=False).choose(8, 15, DEAR).count


def test_the_denoiser_is_tried_now_and_then() -> None:
    def tries(costs: DraftCosts) -> int:
        policy, count = policy_with(times_of(1.0, 1.2)), 0
        for _ in range(1000):
            count += policy.choose(0, 15, costs).asks == "checked"
            policy.learn(0, 0, 0)
        return count

    # In a hundredth of 1000 s, each with its check of 1.2 s.
    assert [tries(DraftCosts(seconds)) for seconds in (3.0, 7.0, 50.0)] == [2, 1, 0]
    alone = policy_with(times_of(1.0, 1.2), with_denoiser=False)
    assert {alone.choose(0, 15, FREE) for _ in range(1000)} == {STEP}


@pytest.mark.parametrize(
    ("changes", "static", "asks"),
    [
        ({}, False, ("checked",)),
        ({"draft_source": "lookup"}, False, ()),
        ({"acceptance": "mix"}, True, ()),
        ({"mode": "auto"}, False, ("checked",)),
        ({"mode": "auto", "quality": "near"}, False, ("checked",)),
        ({"mode": "auto", "quality": "fast"}, False, ("checked", "whole")),
    ],
)
def test_which_policy_a_request_has(
    changes: dict[str, str], static: bool, asks: tuple[str, ...]
) -> None:
    params = replace(VERIFIED, **changes).resolved()  # type: ignore[arg-type]
    policy = policy_with(times_of(1.0, 1.2), params)
    assert isinstance(policy, StaticPolicy) == static
    if isinstance(policy, LearningPolicy):
        for _ in range(40):
            policy.learn_draft("whole", 15, DraftCosts(0.01, 0.01))
            policy.learn_draft("checked", 0, DraftCosts(5.0, 0.01))
        chosen = policy.choose(0, 15, DraftCosts(5.0, 0.01))
        assert chosen.asks == ("whole" if "whole" in asks else "")


def test_where_tokens_depend_on_drafts_they_alone_choose() -> None:
    params = replace(VERIFIED, acceptance="mix")
    policy = policy_with(times_of(1.0, 1.2), params)
    drafts = [policy.choose(match, 15, DEAR) for match in range(9)]
    taught(policy, 8, 0)
    for _ in range(50):
        policy.learn_draft("checked", 0, DEAR)
    assert [policy.choose(match, 15, FREE) for match in range(9)] == drafts
    assert [bool(chosen.asks) for chosen in drafts] == [True] * 3 + [False] * 6
    assert {chosen.count for chosen in drafts[3:]} == {7}
    alone = policy_with(times_of(1.0, 1.2), params, with_denoiser=False)
    assert alone.choose(0, 15, FREE) == STEP


def test_a_short_block_is_not_taken_for_a_long_one() -> None:
    times, experience = times_of(1.0, 1.2), DraftExperience()
    long = policy_of(VERIFIED, times, experience, with_denoiser=True)
    costs = DraftCosts(3.5)
    for _ in range(300):
        long.learn_draft("checked", 15, costs)
        long.learn(0, 0, 0)
    short = policy_of(replace(VERIFIED, block_size=2), times, experience, with_denoiser=True)
    for _ in range(20):
        short.learn(0, 0, 0)
    experience.to_try = 0.0
    # 2 tokens in 4.6 s, where a step gives 1 in 1 s.
    assert short.choose(0, 1, costs) == STEP
