"""The texts that a service writes and a client reads."""

from __future__ import annotations

import pytest

from twotower.deployments.refusals import (
    INTERNAL_TEXT,
    NUMERICAL_TEXT,
    is_own_internal,
    retry_after_of,
    with_retry_after,
)


@pytest.mark.parametrize("seconds", [1.0, 0.25, 30.0, 2.5])
def test_a_hint_arrives(seconds: float) -> None:
    assert retry_after_of(with_retry_after("queue: 3 rows wait", seconds)) == seconds


@pytest.mark.parametrize("text", ["", "queue: 3 rows wait", "; retry after a while", "retry after"])
def test_a_text_without_a_hint_has_none(text: str) -> None:
    assert retry_after_of(text) is None


def test_who_has_failed() -> None:
    assert is_own_internal(f"{INTERNAL_TEXT} req-1")
    assert is_own_internal(f"{NUMERICAL_TEXT}: non-finite logits")
    assert not is_own_internal("The actor died unexpectedly before finishing this task.")
    assert not is_own_internal("no details")
