"""Answers and errors as rows with fixed columns."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.batch_rows import FixedAnswer
from twotower.batch.answers import OUTPUT_SCHEMA, error_row, output_row, output_table
from twotower.batch.requests import BatchRequest, RowError

OPENAI = BatchRequest("a", "/v1/completions", {"prompt": "p"}, None)
PLAIN = BatchRequest("b", "/v1/completions", {"prompt": "p"}, {"prompt": "p", "x": 1})


def test_a_good_answer_with_its_counts() -> None:
    row = output_row(5, PLAIN, FixedAnswer("hello"))
    assert (row["row"], row["custom_id"], row["status"]) == (5, "b", 200)
    assert (row["text"], row["finish_reason"], row["request_id"]) == ("hello", "length", "req-1")
    counts = ("prompt_tokens", "completion_tokens", "nfe", "context_passes")
    assert [row[name] for name in counts] == [3, 5, 7, 2]
    assert json.loads(row["input"]) == {"prompt": "p", "x": 1}
    assert json.loads(row["response"])["choices"][0]["text"] == "hello"
    assert row["error"] is None


def test_a_chats_text_is_its_messages() -> None:
    class Chat(FixedAnswer):
        @property
        def body(self) -> dict[str, Any]:
            return {"choices": [{"message": {"content": "hi"}}, {"message": {"content": "two"}}]}

    row = output_row(5, OPENAI, Chat())
    assert row["text"] == "hi"
    assert row["input"] is None
    assert row["completion_tokens"] == 0


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (
            FixedAnswer(
                status=400,
                error={"code": "too_long", "message": "m", "param": "prompt", "type": "t"},
            ),
            {"code": "too_long", "message": "m", "param": "prompt", "type": "t"},
        ),
        (
            FixedAnswer(status=503, error={}),
            {
                "code": "503",
                "message": "the service answered with status 503",
                "param": None,
                "type": "server_error",
            },
        ),
        (
            FixedAnswer(status=0, error={}),
            {
                "code": "no_connection",
                "message": "no connection to the service could be made",
                "param": None,
                "type": "server_error",
            },
        ),
        (
            FixedAnswer(status=200, error={}),
            {
                "code": "bad_answer",
                "message": "the service's answer has no choices",
                "param": None,
                "type": "server_error",
            },
        ),
    ],
)
def test_an_answer_that_is_not_good(answer: FixedAnswer, error: dict[str, Any]) -> None:
    row = output_row(5, OPENAI, answer)
    assert json.loads(row["error"]) == error
    assert row["text"] is None
    assert row["status"] == answer.status


def test_rows_of_all_kinds_are_one_table() -> None:
    fault = RowError("bad_json", "not valid JSON", None, "named")
    rows = [
        output_row(1, PLAIN, FixedAnswer("a\ud800")),
        error_row(2, None, fault),
        error_row(3, "other", fault),
        error_row(4, None, RowError("bad_json", "not valid JSON")),
    ]
    table = output_table(rows)
    assert table.schema == OUTPUT_SCHEMA
    assert table["custom_id"].to_pylist() == ["b", "named", "other", None]
    assert table["text"].to_pylist() == ["a?", None, None, None]
    assert json.loads(table["error"][1].as_py()) == {
        "code": "bad_json",
        "message": "not valid JSON",
        "param": None,
        "type": "invalid_request_error",
    }
