"""Requests before they are admitted: names, choices and their seeds."""

from __future__ import annotations

import pytest

from twotower.deployments.completions.requests import (
    CompletionRequest,
    choice_seed,
    request_id_of,
)
from twotower.towers.errors import InvalidRequestError
from twotower.towers.request.params import SEED_BITS, GenerationParams


def test_request_ids() -> None:
    assert request_id_of("job-7/a") == "job-7/a"
    assert len({request_id_of("") for _ in range(8)}) == 8
    for wrong in ("a b", "x" * 129, "a\n", "ä"):
        with pytest.raises(InvalidRequestError, match="request_id"):
            request_id_of(wrong)


def test_each_choice_has_a_seed_of_its_own_and_the_first_that_of_the_request() -> None:
    request = CompletionRequest("r", [1], GenerationParams(seed=11, temperature=1.0), n=4)
    seeds = [params.seed for params in request.choices()]
    assert seeds[0] == 11
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 2**SEED_BITS for seed in seeds if seed is not None)
    assert seeds == [params.seed for params in request.choices()]
    assert {params.temperature for params in request.choices()} == {1.0}


def test_seeds_of_choices_do_not_change_with_a_release() -> None:
    # A client may keep a seed for years: these were computed by hashlib alone.
    import hashlib

    digest = hashlib.blake2b(b"11/choice/1", digest_size=8).digest()
    assert choice_seed(11, 1) == int.from_bytes(digest, "little") // 2


def test_without_a_seed_one_is_drawn_for_all() -> None:
    request = CompletionRequest("r", [1], GenerationParams(), n=2)
    first, second = request.choices()
    assert first.seed is not None
    assert second.seed == choice_seed(first.seed, 1)
