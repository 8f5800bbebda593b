"""W3C's traceparent: which headers are one, and what stands in for those that are none."""

from __future__ import annotations

import re

import pytest

from twotower.protos import trace_context
from twotower.protos.trace_context import trace_id_of, trace_parent_of

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
GOOD = f"00-{TRACE}-{SPAN}-01"


def test_a_callers_trace_goes_on() -> None:
    assert trace_parent_of([GOOD]) == GOOD
    assert trace_id_of(GOOD) == TRACE
    assert trace_parent_of([f"00-{TRACE}-{SPAN}-ff"]).endswith("-ff")


@pytest.mark.parametrize(
    "given",
    [
        [],
        [""],
        [GOOD, GOOD],
        [f"01-{TRACE}-{SPAN}-01"],
        [f"ff-{TRACE}-{SPAN}-01"],
        [f"00-{'0' * 32}-{SPAN}-01"],
        [f"00-{TRACE}-{'0' * 16}-01"],
        [f"00-{TRACE.upper()}-{SPAN}-01"],
        [f"00-{TRACE[1:]}-{SPAN}-01"],
        [f"00-{TRACE}-{SPAN}-1"],
        [f"{GOOD}-00"],
        [f"{GOOD}\n"],
        [f" {GOOD}"],
        ["x" * 100_000],
    ],
)
def test_another_form_is_replaced(given: list[str]) -> None:
    drawn = [trace_parent_of(given) for _ in range(3)]
    assert len({trace_id_of(each) for each in drawn}) == 3
    for each in drawn:
        assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-00", each)
        assert each not in given


def test_zeros_are_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = iter([0, 5, 0, 0, 6])
    monkeypatch.setattr(trace_context.secrets, "randbits", lambda _bits: next(numbers))
    assert trace_parent_of([]) == f"00-{5:032x}-{6:016x}-00"


def test_the_trace_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected 00-TRACE-SPAN-FLAGS"):
        trace_id_of("00-1-2-3")
