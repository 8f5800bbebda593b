"""A block is committed once, in its place."""

from __future__ import annotations

from dataclasses import replace

import pytest

from twotower.towers.decoding.commit_log import CommitLog
from twotower.towers.decoding.services import Block
from twotower.towers.errors import UnavailableError
from twotower.towers.request.params import GenerationParams
from twotower.towers.request.results import Usage


def block(start: int, *token_ids: int, nfe: int = 1, passes: int = 1) -> Block:
    count = len(token_ids)
    return Block(start, token_ids, (0,) * count, (1.0,) * count, nfe=nfe, context_passes=passes)


def test_blocks_in_order() -> None:
    log = CommitLog(3, ())
    assert log.append(block(3, 7, 8, nfe=2))
    assert log.append(block(5, 9, nfe=3, passes=0))
    assert log.token_ids == (7, 8, 9)
    assert (log.end, log.num_blocks, log.nfe, log.context_passes) == (6, 2, 5, 1)


def test_the_counts_of_all_blocks_are_added_up() -> None:
    log = CommitLog(3, ())
    log.append(replace(block(3, 7), accepted_tokens=1, drafted_tokens=4, cached_tokens=2))
    log.append(replace(block(4, 8, 9), accepted_tokens=2, drafted_tokens=3))
    assert (log.accepted_tokens, log.drafted_tokens, log.cached_tokens) == (3, 7, 2)
    assert log.usage == Usage(3, 3, 2, 2, 2, 3, 7)


def test_what_an_attempt_finds_in_the_cache_beyond_the_prompt_does_not_count() -> None:
    log = CommitLog(3, (5, 6))
    log.append(replace(block(5, 7), cached_tokens=5))
    assert log.cached_tokens == 3


def test_the_first_block_settles_what_the_rest_is_made_with() -> None:
    asked = GenerationParams(steps_per_block=16, min_steps_per_block=4, seed=1)
    log = CommitLog(3, ())
    assert log.served(asked) is asked
    log.append(replace(block(3, 7), eased=0.75))
    log.append(block(4, 8))
    assert log.served(asked) == GenerationParams(steps_per_block=7, seed=1)


def test_what_is_committed_stays() -> None:
    log = CommitLog(3, ())
    log.append(block(3, 7, 8))
    assert not log.append(block(3, 1, 2))
    assert not log.append(block(4, 1))
    assert (log.token_ids, log.nfe) == ((7, 8), 1)
    assert log.has(block(4, 1))
    assert not log.has(block(5, 1))


def test_a_gap_fails_the_attempt() -> None:
    log = CommitLog(3, ())
    with pytest.raises(UnavailableError, match="got one at 4, expected 3"):
        log.append(block(4, 1))
    with pytest.raises(UnavailableError, match="got one at 5, expected 3"):
        log.has(block(5, 1))
    assert log.token_ids == ()


def test_resumed_tokens_are_output_but_not_blocks() -> None:
    log = CommitLog(3, (5, 6))
    assert log.end == 5
    assert log.append(block(5, 7))
    assert (log.token_ids, log.num_blocks) == ((5, 6, 7), 1)
