"""Differences and costs of outputs that are written by hand."""

from __future__ import annotations

import pytest

from benchmarks.verified import first_difference, rows
from twotower import GenerationResult
from twotower.towers.decoding.services import Block
from twotower.towers.engine.options import PREFILL_CHUNK


def result(token_ids: list[int], log_probs: list[float]) -> GenerationResult:
    return GenerationResult(
        token_ids, "", "length", 0, len(token_ids), 0, [], None, 0, 0, 0, log_probs
    )


def test_equal_outputs_have_no_difference() -> None:
    assert first_difference(0, result([5, 6], [-1.0, -2.0]), result([5, 6], [-1.0, -2.0])) is None


def test_the_first_of_two_differences_counts() -> None:
    ar = result([5, 6, 7, 8], [-0.1, -0.2, -0.3, -0.4])
    verified = result([5, 9, 7, 9], [-0.1, -0.6, -0.3, -0.8])
    assert first_difference(3, ar, verified) == {
        "prompt": 3,
        "position": 1,
        "ar_token": 6,
        "ar_log_prob": -0.2,
        "verified_token": 9,
        "verified_log_prob": -0.6,
    }


def test_an_output_that_ends_early_is_an_error() -> None:
    with pytest.raises(ValueError, match="prompt 4: got 1 tokens, expected ar's 2"):
        first_difference(4, result([5, 6], [-1.0, -2.0]), result([5], [-1.0]))


def test_passes_count_up_to_the_end_of_the_last_block_looked_at() -> None:
    sizes, start = (3, 4, 5), 0
    blocks = []
    for size in sizes:
        # The first block has the two passes that read a prompt of a token more than a piece.
        passes = 1 if start else 3
        blocks.append(Block(start, (7,) * size, (0,) * size, (0.5,) * size, 2, passes))
        start += size
    whole = result([7] * 12, [-1.0] * 12)
    whole.blocks.extend(blocks)
    prompt = list(range(PREFILL_CHUNK + 1))
    for tokens, nfe, passes in ((3, 2, 1), (4, 4, 2), (7, 4, 2), (8, 6, 3), (99, 6, 3)):
        (row,) = rows([prompt], [whole], tokens)
        assert len(row.token_ids) == len(row.log_probs) == min(tokens, 12)
        assert (row.nfe, row.context_passes) == (nfe, passes)
