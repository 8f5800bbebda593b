"""Bodies of very many lists and objects."""

from __future__ import annotations

import json

import pytest

from tests.deployments.http.conftest import FrontHere
from twotower.deployments.http.counted import MAX_CONTAINERS, check_containers
from twotower.towers.errors import InvalidRequestError

EMPTY = b"[],"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
async def test_too_many_lists_are_refused_unparsed(front: FrontHere, path: str) -> None:
    # No JSON either, which nobody has come to notice.
    body = b'{"prompt":[' + EMPTY * MAX_CONTAINERS
    text = f"body: got '{MAX_CONTAINERS + 2} lists and objects', expected at most {MAX_CONTAINERS}"
    status, message, field = await front.refused(body, path)
    assert (status, field) == (400, "body")
    assert message.startswith(text)


def test_lists_up_to_the_limit_are_taken() -> None:
    check_containers(b"{" + EMPTY * (MAX_CONTAINERS - 1))
    with pytest.raises(InvalidRequestError):
        check_containers(b"{" + EMPTY * MAX_CONTAINERS)


def test_brackets_in_texts_do_not_count() -> None:
    text = '[{"\\' * MAX_CONTAINERS
    check_containers(json.dumps({"prompt": text, "stop": [text, "]"]}).encode())
    with pytest.raises(InvalidRequestError):
        check_containers(json.dumps({"prompt": text}).encode() + EMPTY * MAX_CONTAINERS)


def test_a_text_that_does_not_end_is_read_once() -> None:
    # Quotes that are each tried as a beginning would take minutes.
    check_containers(b'{"a":"' + b'\\"[' * 1_000_000)
