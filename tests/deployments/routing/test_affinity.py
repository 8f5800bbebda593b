"""Which pair a prompt belongs to: what is shared, groups of pairs, and the order of pairs."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from twotower.deployments.routing.affinity import (
    MOST_STEPS,
    STEP_TOKENS,
    Beginnings,
    Place,
    Remembered,
    chain_of,
    pair_keys,
    preferred,
)

PAIRS = [f"pair-{number}" for number in range(20)]


def prompt_of(seed: int, tokens: int = STEP_TOKENS) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(1000) for _ in range(tokens)]


def pair_of(place: Place, pairs: Sequence[str] = PAIRS, full: Sequence[str] = ()) -> str | None:
    fits = np.array([pair not in full for pair in pairs], dtype=bool)
    found = preferred(place, pair_keys(pairs), fits)
    return None if found is None else pairs[found]


def alone(seed: int) -> Place:
    """The place of a prompt that shares nothing."""
    return Beginnings().place(chain_of(prompt_of(seed)))


def test_a_chain_has_a_key_for_each_whole_step_that_says_all_before_it() -> None:
    prompt = prompt_of(1, 3 * STEP_TOKENS + 5)
    chain = chain_of(prompt)
    assert len(chain) == len(set(chain)) == 3
    assert chain_of([*prompt[: 2 * STEP_TOKENS], 7])[:2] == chain[:2]
    other = chain_of([prompt[0] + 1, *prompt[1:]])
    assert not set(other) & set(chain)
    assert chain_of(prompt[: STEP_TOKENS - 1]) == chain_of([]) == []
    assert len(chain_of(prompt_of(1, (MOST_STEPS + 1) * STEP_TOKENS))) == MOST_STEPS


def test_every_router_finds_the_same_pair_whatever_the_order() -> None:
    for seed in range(50):
        own = pair_of(alone(seed))
        assert own in PAIRS
        assert pair_of(alone(seed), PAIRS[::-1]) == own


def test_different_prompts_spread() -> None:
    counts = Counter(pair_of(alone(seed)) for seed in range(2000))
    assert set(counts) == set(PAIRS)
    # 100 each, with a standard deviation of 10.
    assert 60 < min(counts.values()) <= max(counts.values()) < 140


def test_a_pair_that_goes_moves_only_its_own_prompts() -> None:
    rest = [pair for pair in PAIRS if pair != PAIRS[2]]
    for seed in range(200):
        own = pair_of(alone(seed))
        if own != PAIRS[2]:
            assert pair_of(alone(seed), rest) == own


def test_a_pair_that_is_full_is_passed_over_for_the_one_that_follows_if_it_were_gone() -> None:
    for seed in range(50):
        own = pair_of(alone(seed))
        assert own is not None
        rest = [pair for pair in PAIRS if pair != own]
        assert pair_of(alone(seed), full=[own]) == pair_of(alone(seed), rest)
    assert pair_of(alone(1), full=PAIRS) is None
    assert pair_of(alone(1), []) is None


def test_turns_of_a_chat_have_one_place() -> None:
    beginnings, chat = Beginnings(), prompt_of(3, 9 * STEP_TOKENS)
    places = {
        beginnings.place(chain_of(chat[:end]))[:2] for end in range(STEP_TOKENS, len(chat), 100)
    }
    assert len(places) == 1


def test_chats_behind_one_system_prompt_share_a_group_and_keep_a_place_of_their_own() -> None:
    beginnings, system = Beginnings(), prompt_of(5, 5 * STEP_TOKENS + 10)
    chats = [[*system, *prompt_of(seed, 4 * STEP_TOKENS)] for seed in range(100, 140)]
    beginnings.place(chain_of(chats[0]))
    first = [beginnings.place(chain_of(chat)) for chat in chats[1:]]
    assert {place.group for place in first} == {chain_of(system)[-1]}
    assert len({place.own for place in first}) == len(first)
    # The next turn of each, in another order.
    again = [beginnings.place(chain_of([*chat, *prompt_of(1)])) for chat in chats[:0:-1]]
    assert [place.own for place in again[::-1]] == [place.own for place in first]


def test_two_routers_agree_once_each_has_seen_two_prompts() -> None:
    system = prompt_of(5, 3 * STEP_TOKENS)
    chats = [[*system, *prompt_of(seed, STEP_TOKENS)] for seed in range(100, 106)]
    one, other = Beginnings(), Beginnings()
    for chat in chats[:2]:
        one.place(chain_of(chat))
    for chat in chats[2:4]:
        other.place(chain_of(chat))
    for chat in chats[4:]:
        assert one.place(chain_of(chat))[:2] == other.place(chain_of(chat))[:2]


@pytest.mark.parametrize(("share", "pairs"), [(0.0, 1), (0.02, 1), (0.1, 4), (0.3, 12), (1.0, 20)])
def test_a_beginning_has_pairs_in_proportion_to_its_share(share: float, pairs: int) -> None:
    found = {pair_of(Place(77, own * 2**50, share)) for own in range(1000)}
    assert len(found) == pairs


def test_a_larger_group_has_the_pairs_of_the_smaller() -> None:
    small = {pair_of(Place(77, own * 2**50, 0.1)) for own in range(1000)}
    assert small < {pair_of(Place(77, own * 2**50, 0.2)) for own in range(1000)}


def test_the_share_of_a_beginning_is_that_of_the_prompts_so_far() -> None:
    beginnings = Beginnings()
    hot = prompt_of(9, 2 * STEP_TOKENS)
    for seed in range(300):
        beginnings.place(chain_of([*hot, *prompt_of(seed)] if seed % 3 == 0 else prompt_of(seed)))
    place = beginnings.place(chain_of([*hot, *prompt_of(1000)]))
    assert place.share == pytest.approx(1 / 3, abs=0.02)


def test_what_is_used_is_remembered() -> None:
    remembered: Remembered[int] = Remembered(10)
    for key in range(100):
        remembered.put(key, key + 1)
        assert remembered.get(0) == 1
    assert [key for key in range(90, 100) if remembered.get(key) != key + 1] == []
    assert remembered.get(50) is None
