"""W3C's traceparent: which headers are one."""

from __future__ import annotations

import pytest

from twotower.protos.trace_context import given_trace

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
GOOD = f"00-{TRACE}-{SPAN}-01"


def test_a_callers_trace_goes_on() -> None:
    assert given_trace([GOOD]) == GOOD
    assert given_trace([f"00-{TRACE}-{SPAN}-ff"]) == f"00-{TRACE}-{SPAN}-ff"


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
def test_another_form_is_none(given: list[str]) -> None:
    assert given_trace(given) is None
