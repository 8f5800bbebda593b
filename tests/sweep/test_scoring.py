"""Task scores of single outputs."""

from __future__ import annotations

import pytest

from twotower.sweep.prompts import SweepPrompt
from twotower.sweep.scoring import exact, next_line, scorers_named
from twotower.towers.errors import InvalidRequestError

WITH, WITHOUT = SweepPrompt("p", "r"), SweepPrompt("p")


@pytest.mark.parametrize(
    ("output", "reference", "score"),
    [
        ("\n    return 1\nx", "\n    return 1\n    y", 1.0),
        ("    return 1  \n", "    return 1", 1.0),
        ("return 1", "    return 1", 0.0),
        ("", "x", 0.0),
    ],
)
def test_next_line(output: str, reference: str, score: float) -> None:
    assert next_line("p", output, reference) == score


def test_exact() -> None:
    assert exact("p", " a\nb\n", "a\nb") == 1.0
    assert exact("p", "a", "a\nb") == 0.0


def test_a_function_of_the_users_own() -> None:
    found = scorers_named(["next_line", "benchmarks.held_out:valid_python"], [WITH])
    assert list(found) == ["next_line", "valid_python"]
    assert found["valid_python"]("def f():\n", "    return 1\n", None) == 1.0
    assert found["valid_python"]("def f():\n", "  ) return\n", None) == 0.0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bleu", "score: got 'bleu', expected one of none, next_line, exact, or module:function"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("math:no_such", "has no attribute 'no_such'"),
        ("math:pi", "expected a function"),
        ("exact", "a reference for each prompt .prompt 1 without"),
    ],
)
def test_scores_that_cannot_be(name: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        scorers_named([name], [WITH, WITHOUT])
