"""Numbers of rows, JSON of records, and faults that travel as lines."""

from __future__ import annotations

import json
from datetime import date, datetime
from decimal import Decimal
from typing import Any

import pytest

from twotower.batch.lines import dump_json, fault_line, read_fault, row_number, split_row


def test_rows_sort_in_the_order_of_the_input() -> None:
    places = [(0, 0), (0, 7), (0, 2**40 - 1), (1, 0), (4000, 3)]
    rows = [row_number(*place) for place in places]
    assert rows == sorted(rows)
    assert rows[-1] < 2**63
    assert [split_row(row) for row in rows] == places


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": "ä\n"}, '{"a": "ä\\n"}'),
        ([1.5, float("nan"), {"x": float("-inf")}], '[1.5, null, {"x": null}]'),
        (["\ud800"], '["\\ud800"]'),
        ([datetime(2026, 1, 2, 3), date(2026, 1, 2)], '["2026-01-02T03:00:00", "2026-01-02"]'),
        ([Decimal("1.50"), b"\xffa"], '["1.50", "\ufffda"]'),
    ],
)
def test_json_of_whatever_a_file_holds(value: Any, text: str) -> None:
    assert dump_json(value) == text


def test_a_fault_is_read_again_and_no_line_of_a_file_is_one() -> None:
    fault = ("bad_csv", "not valid\nCSV", None, "ä")
    assert read_fault(fault_line(*fault)) == fault
    assert read_fault(json.dumps(list(fault))) is None
