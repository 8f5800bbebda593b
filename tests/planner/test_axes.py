"""Axes of a map as they are written on a command line."""

from __future__ import annotations

import pytest

from twotower.planner.axes import BATCHES, TOKENS, batches_named, tokens_named
from twotower.towers.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1,4, 16", (1, 4, 16)),
        ("1,2,4,...,256", BATCHES),
        ("3,...,20,30", (3, 6, 12, 20, 30)),
    ],
)
def test_batches(text: str, expected: tuple[int, ...]) -> None:
    assert batches_named(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1..8", TOKENS), ("1..2.2", (1.0, 1.5, 2.0, 2.2)), ("1,2.5,16", (1.0, 2.5, 16.0))],
)
def test_tokens(text: str, expected: tuple[float, ...]) -> None:
    assert tokens_named(text) == expected


@pytest.mark.parametrize("text", ["", "1,x", "...,4", "1,...", "0,...,4"])
def test_other_batches_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="batches: got"):
        batches_named(text)


@pytest.mark.parametrize("text", ["", "1..", "..8", "a,b"])
def test_other_tokens_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="tokens_per_pass: got"):
        tokens_named(text)
