"""Lines of output files, good and bad."""

from __future__ import annotations

import json

from tests.support.batch_rows import FixedAnswer, bad_row, good_row
from twotower.batch.answers import output_row
from twotower.batch.lines import row_number
from twotower.batch.output_lines import error_line, good_line, row_of_error
from twotower.batch.requests import BatchRequest


def test_a_good_row_of_openais_format() -> None:
    row = good_row(row_number(1, 2))
    assert json.loads(good_line(row)) == {
        "id": "batch_req_10000000002",
        "custom_id": f"id-{row_number(1, 2)}",
        "response": {
            "status_code": 200,
            "request_id": "req-1",
            "body": json.loads(row["response"]),
        },
        "error": None,
    }


def test_a_good_plain_row_keeps_its_columns() -> None:
    record = {"prompt": "p", "text": "own", "custom_id": 4, "x": [1]}
    assert json.loads(good_line(good_row(7, record))) == {
        "prompt": "p",
        "input_text": "own",
        "custom_id": "id-7",
        "x": [1],
        "text": "text 7",
        "finish_reason": "length",
        "usage": FixedAnswer().body["usage"],
    }


def test_a_row_that_was_never_posted() -> None:
    line = error_line(bad_row(row_number(1, 2)), ["a.jsonl", "b.csv"])
    assert json.loads(line) == {
        "id": "batch_req_10000000002",
        "custom_id": f"id-{row_number(1, 2)}",
        "response": None,
        "error": {
            "code": "empty_prompt",
            "message": "prompt: is empty",
            "param": "prompt",
            "line": 3,
            "file": "b.csv",
        },
    }
    assert row_of_error(line.encode()) == row_number(1, 2)


def test_a_row_that_the_service_refused() -> None:
    request = BatchRequest("a", "/v1/completions", {}, {"prompt": "p"})
    answer = FixedAnswer(status=400, error={"code": "c", "message": "m"})
    line = json.loads(error_line(output_row(0, request, answer), ["a.jsonl"]))
    assert line["response"] == {
        "status_code": 400,
        "request_id": "req-1",
        "body": {"error": {"code": "c", "message": "m"}},
    }
    assert line["error"]["line"] == 1
