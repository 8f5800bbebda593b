"""Records of both kinds as requests, and what is refused, with its reason and field."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.batch.lines import MAX_LINE_BYTES, fault_line
from twotower.batch.requests import (
    BatchDefaults,
    BatchRequest,
    RowError,
    custom_id_of,
    parse_request,
)
from twotower.data.bodies import row_seed

DEFAULTS = BatchDefaults(body={"max_tokens": 8, "mode": "ar"}, seed=5)


def request_of(record: Any, defaults: BatchDefaults = DEFAULTS, row: int = 3) -> BatchRequest:
    return parse_request(row, json.dumps(record), defaults)


def openai_record(**changes: Any) -> dict[str, Any]:
    record = {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/completions",
        "body": {"prompt": "hello", "max_tokens": 2},
    }
    return {**record, **changes}


def test_a_row_of_openais_format_keeps_its_body() -> None:
    request = request_of(openai_record(method="post"))
    assert request.custom_id == "a"
    assert request.url == "/v1/completions"
    assert request.body == {
        "max_tokens": 2,
        "mode": "ar",
        "prompt": "hello",
        "seed": row_seed(5, "a"),
    }
    assert request.record is None


def test_a_chat_of_openais_format() -> None:
    messages = [{"role": "user", "content": "hi"}]
    body = {"messages": messages, "seed": 9, "stream": False}
    request = request_of(openai_record(url="/v1/chat/completions", body=body))
    assert request.body == {"max_tokens": 8, "mode": "ar", "messages": messages, "seed": 9}


@pytest.mark.parametrize(
    ("record", "url", "posted"),
    [
        ({"prompt": "hi"}, "/v1/completions", {"prompt": "hi"}),
        ({"prompt": [1, 2]}, "/v1/completions", {"prompt": [1, 2]}),
        (
            {"messages": [{"role": "user"}], "prompt": None},
            "/v1/chat/completions",
            {"messages": [{"role": "user"}]},
        ),
        ({"prompt": [{"role": "user"}]}, "/v1/chat/completions", {"messages": [{"role": "user"}]}),
        ({"prompt": "hi", "messages": "data"}, "/v1/completions", {"prompt": "hi"}),
        ({"prompt": "hi", "seed": 1, "max_tokens": 99}, "/v1/completions", {"prompt": "hi"}),
        ({"prompt": "hi", "body": "an e-mail", "url": "x"}, "/v1/completions", {"prompt": "hi"}),
    ],
)
def test_a_plain_row(record: dict[str, Any], url: str, posted: dict[str, Any]) -> None:
    request = request_of(record)
    assert request.url == url
    assert request.custom_id == "row-3"
    assert request.body == {"max_tokens": 8, "mode": "ar", **posted, "seed": row_seed(5, "row-3")}
    assert request.record == record


def test_the_prompts_column_has_a_name() -> None:
    defaults = BatchDefaults(prompt_column="question")
    assert request_of({"question": "why", "prompt": 1}, defaults).body["prompt"] == "why"


@pytest.mark.parametrize(
    ("names", "custom_id"),
    [
        ({}, "row-3"),
        ({"custom_id": "x", "id": "y"}, "x"),
        ({"custom_id": 7}, "7"),
        ({"custom_id": None, "id": 12}, "12"),
        ({"id": ""}, "row-3"),
        ({"id": 1.5}, "row-3"),
        ({"id": True}, "row-3"),
        ({"custom_id": "z" * 512}, "z" * 512),
    ],
)
def test_names_of_plain_rows(names: dict[str, Any], custom_id: str) -> None:
    assert request_of({"prompt": "p", **names}).custom_id == custom_id


FAULTS: list[tuple[str, str, str | None]] = [
    ('{"prompt": "a"', "bad_json", None),
    ("", "bad_json", None),
    ('{"prompt": "a", "x": NaN}', "bad_json", None),
    ('{"prompt": "a", "x": 1e999}', "bad_json", None),
    ('{"prompt": ' + "[" * 5000 + "]" * 5000 + "}", "bad_json", None),
    ('{"prompt": "a", "x": ' + "[" * 150 + "]" * 150 + "}", "bad_json", None),
    ('{"prompt": ' + "9" * 5000 + "}", "bad_json", None),
    ("[1, 2]", "not_an_object", None),
    ('"text"', "not_an_object", None),
    ("{}", "missing_prompt", "prompt"),
    ('{"prompt": null}', "missing_prompt", "prompt"),
    ('{"prompt": ""}', "empty_prompt", "prompt"),
    ('{"prompt": []}', "empty_prompt", "prompt"),
    ('{"prompt": 5}', "invalid_type", "prompt"),
    ('{"prompt": ["a"]}', "invalid_type", "prompt"),
    ('{"prompt": [true]}', "invalid_type", "prompt"),
    ('{"messages": "hi"}', "invalid_type", "messages"),
    ('{"messages": []}', "empty_messages", "messages"),
    ('{"prompt": "a", "custom_id": 1.5}', "invalid_type", "custom_id"),
    ('{"prompt": "a", "custom_id": ""}', "invalid_custom_id", "custom_id"),
    ('{"prompt": "a", "custom_id": "\\ud800"}', "invalid_custom_id", "custom_id"),
    ('{"prompt": "a", "id": "' + "x" * 513 + '"}', "invalid_custom_id", "id"),
    (json.dumps(openai_record(custom_id=None)), "missing_custom_id", "custom_id"),
    (json.dumps(openai_record(custom_id=4)), "invalid_type", "custom_id"),
    (json.dumps(openai_record(custom_id="x" * 513)), "invalid_custom_id", "custom_id"),
    (json.dumps(openai_record(method=None)), "missing_method", "method"),
    (json.dumps(openai_record(method="GET")), "invalid_method", "method"),
    (json.dumps(openai_record(url=None)), "missing_url", "url"),
    (json.dumps(openai_record(url=3)), "invalid_type", "url"),
    (json.dumps(openai_record(url="/v1/embeddings")), "unknown_url", "url"),
    (json.dumps(openai_record(body=None)), "missing_body", "body"),
    (json.dumps(openai_record(body="text")), "invalid_type", "body"),
    (json.dumps(openai_record(body={})), "missing_prompt", "body.prompt"),
    (json.dumps(openai_record(body={"prompt": ""})), "empty_prompt", "body.prompt"),
    (json.dumps(openai_record(body={"prompt": {}})), "invalid_type", "body.prompt"),
    (
        json.dumps(openai_record(url="/v1/chat/completions")),
        "missing_messages",
        "body.messages",
    ),
    (
        json.dumps(openai_record(body={"prompt": "a", "stream": True})),
        "stream_not_supported",
        "body.stream",
    ),
    (json.dumps(openai_record(body={"prompt": "a", "stream": 1})), "invalid_type", "body.stream"),
]


@pytest.mark.parametrize(("line", "code", "param"), FAULTS)
def test_a_faulty_row_says_why_and_where(line: str, code: str, param: str | None) -> None:
    with pytest.raises(RowError) as refused:
        parse_request(0, line, DEFAULTS)
    assert (refused.value.code, refused.value.param) == (code, param)
    assert refused.value.message.startswith(param or "")
    # The text goes into a file in UTF-8.
    assert len(refused.value.message.encode()) < 400


def test_a_faulty_row_keeps_its_name() -> None:
    with pytest.raises(RowError) as refused:
        request_of(openai_record(url="/v2"))
    assert pickle.loads(pickle.dumps(refused.value)).custom_id == "a"


def test_a_long_line_is_refused() -> None:
    with pytest.raises(RowError) as refused:
        parse_request(0, '"' + "a" * MAX_LINE_BYTES + '"', DEFAULTS)
    assert refused.value.code == "line_too_long"


def test_what_a_reader_found_is_the_rows_error() -> None:
    with pytest.raises(RowError) as refused:
        parse_request(0, fault_line("bad_csv", "why", "x", "name"), DEFAULTS)
    error = refused.value
    assert (error.code, error.message, error.param, error.custom_id) == (
        "bad_csv",
        "why",
        "x",
        "name",
    )


def test_seeds_belong_to_names() -> None:
    names = [f"row-{index}" for index in range(500)]
    seeds = [row_seed(1, name) for name in names]
    assert len(set(seeds)) == 500
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds != [row_seed(2, name) for name in names]
    # Fixed for good: a resumed job must give a row the seed that it had.
    assert row_seed(0, "a") == 6841154156042874738


texts = st.sampled_from(["", "a", "ä\n", "\ud800", "x" * 600])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
json_values = scalars | st.lists(scalars, max_size=3) | st.dictionaries(texts, scalars, max_size=3)
fields = st.sampled_from(
    ["prompt", "messages", "custom_id", "id", "url", "method", "body", "stream", "other"]
)
known = st.sampled_from(["POST", "/v1/completions", "/v1/chat/completions", "", [], {}, True])


@settings(deadline=None)
@given(st.dictionaries(fields, json_values | known | st.dictionaries(fields, known)))
def test_any_record_is_a_request_or_a_fault(record: dict[str, Any]) -> None:
    line = json.dumps(record)
    custom_id = custom_id_of(9, line, "prompt")
    request, error = None, None
    try:
        request = parse_request(9, line, DEFAULTS)
    except RowError as refused:
        error = refused
    if request is not None:
        assert request.custom_id == custom_id
        assert request.body["seed"] is not None
        assert "stream" not in request.body
    else:
        assert error is not None
        assert error.code
        assert error.custom_id == custom_id
