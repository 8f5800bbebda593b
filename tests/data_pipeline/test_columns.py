"""Columns of completions: what is asked of a row, and what becomes of its answer."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pyarrow as pa
import pytest

from twotower.data.bodies import row_seed
from twotower.data.caller import Answer
from twotower.data.columns import INCLUDABLE, CompletionColumns, RowFailedError
from twotower.data.pipeline import completions
from twotower.towers.errors import InvalidRequestError

ANSWER = Answer(
    200,
    {
        "choices": [
            {
                "index": 0,
                "text": "out",
                "finish_reason": "stop",
                "stop_reason": "\n",
                "token_ids": [4, 5],
            }
        ],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 2,
            "twotower": {
                **{"nfe": 6, "context_passes": 1, "cached_tokens": 0},
                **{"accepted_tokens": 5, "drafted_tokens": 8},
                **{"lookup_accepted_tokens": 2, "lookup_drafted_tokens": 3},
            },
        },
    },
    "name",
    1,
)
REFUSAL = Answer(
    400, {"error": {"message": "no", "type": "t", "param": "p", "code": None}}, "name", 1
)


def work(**changed: Any) -> CompletionColumns:
    arguments: dict[str, Any] = {
        "prompt": "prompt",
        "params": {"max_tokens": 4},
        "output": "text",
        "include": (),
        "id_column": None,
        "seed": 7,
        "raises": True,
    }
    return CompletionColumns(**arguments | changed)


def test_a_rows_seed_is_that_of_its_id_or_prompt() -> None:
    row = {"prompt": "a", "id": 12, "other": None}
    assert work().to_request(row).body == {
        "max_tokens": 4,
        "prompt": "a",
        "seed": row_seed(7, "a"),
    }
    assert work(id_column="id").to_request(row).body["seed"] == row_seed(7, "12")
    assert work(params={"seed": 3}).to_request(row).body == {"prompt": "a", "seed": 3}


def test_columns_that_a_row_is_made_of() -> None:
    assert work().columns == ["prompt"]
    assert work(id_column="id").columns == ["prompt", "id"]
    function = work(prompt=lambda row: f"{row['a']} {row['b']}")
    assert function.columns is None
    assert function.to_request({"a": 1, "b": "x"}).body["prompt"] == "1 x"


def test_everything_that_can_be_included() -> None:
    asked = work(include=tuple(INCLUDABLE))
    request = asked.to_request({"prompt": "a"})
    assert request.body["return_token_ids"] is True
    output = asked.to_output({"prompt": "a"}, request, ANSWER)
    batch = pa.table({"prompt": ["a"], "image": [b"\x00"]})
    (row,) = asked.to_table(batch, [output]).to_pylist()
    assert json.loads(row.pop("response")) == ANSWER.body
    assert row == {
        "prompt": "a",
        "image": b"\x00",
        "text": "out",
        "finish_reason": "stop",
        "stop_reason": "\n",
        "token_ids": [4, 5],
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "nfe": 6,
        "context_passes": 1,
        "cached_tokens": 0,
        "accepted_tokens": 5,
        "drafted_tokens": 8,
        "lookup_accepted_tokens": 2,
        "lookup_drafted_tokens": 3,
        "seed": row_seed(7, "a"),
        "request_id": "name",
    }


def test_an_answer_of_a_chat() -> None:
    request = work().to_request({"prompt": [{"role": "user", "content": "a"}]})
    body = {"choices": [{"message": {"role": "assistant", "content": "hi"}}]}
    assert work().to_output({}, request, Answer(200, body, "", 1))["text"] == "hi"


def test_an_error_as_a_column() -> None:
    kept = work(raises=False, include=("finish_reason", "nfe"))
    request = kept.to_request({"prompt": "a"})
    with pytest.raises(InvalidRequestError) as caught:
        kept.to_request({"prompt": None})
    outputs = [
        kept.to_output({}, request, REFUSAL),
        kept.to_output({}, request, ANSWER),
        kept.to_error({}, caught.value),
    ]
    batch = pa.table({"prompt": ["a", "a", None]})
    refused, good, bad = kept.to_table(batch, outputs).to_pylist()
    assert (good["text"], good["finish_reason"], good["nfe"], good["error"]) == (
        "out",
        "stop",
        6,
        None,
    )
    assert (refused["text"], refused["nfe"], bad["text"]) == (None, None, None)
    assert json.loads(refused["error"]) == {**REFUSAL.body["error"], "status": 400}
    error = json.loads(bad["error"])
    assert (error["param"], error["status"]) == ("prompt", 0)
    assert error["message"].startswith("prompt: got None, expected a text")


def test_an_error_that_is_to_end_the_pipeline_names_the_row() -> None:
    with pytest.raises(RowFailedError, match=r"^row 12: status 400: no$") as caught:
        work(id_column="id").to_output({"id": 12}, None, REFUSAL)
    # It comes back from another process.
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_no_column_is_lost() -> None:
    batch = pa.table({"prompt": ["a"], "text": ["mine"]})
    with pytest.raises(InvalidRequestError, match="output: got 'text', expected a column that"):
        work().to_table(batch, [{"text": "out"}])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"include": ["tokens"]}, r"include\[0\]: got 'tokens', expected one of finish_reason"),
        ({"on_error": "skip"}, "on_error: got 'skip', expected one of raise, column"),
        ({"output": "error"}, "output: got 'error', expected a name that no other new column has"),
        ({"output": "finish_reason"}, "output: got 'finish_reason'"),
        ({"params": {"n": 4}}, r"params\.n: got 4"),
        ({"target": "host"}, "target: got 'host'"),
        ({"concurrency": 0}, "concurrency: got 0"),
        ({"api_key": "two words"}, "api_key: got another text"),
    ],
)
def test_arguments_are_checked_before_anything_runs(arguments: dict[str, Any], text: str) -> None:
    nothing: Any = None
    with pytest.raises(InvalidRequestError, match=text):
        completions(nothing, **{"target": "host:1", **arguments})
