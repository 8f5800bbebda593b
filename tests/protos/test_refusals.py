"""The texts that a service writes and a client reads."""

from __future__ import annotations

import grpc
import pytest

from twotower.protos.refusals import (
    BUSY_TEXT,
    INTERNAL_TEXT,
    LOST_TEXT,
    NUMERICAL_TEXT,
    client_status,
    is_lost,
    is_own_internal,
    marked,
    retry_after_of,
    shown,
    with_retry_after,
)

Code = grpc.StatusCode


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


@pytest.mark.parametrize("code", list(Code))
def test_only_marked_texts_are_shown(code: Code) -> None:
    assert shown(code, marked("a: got 1")) == (code, "a: got 1")
    got, text = shown(code, "The actor died. class_name: ServeReplica, pid 17")
    assert "actor" not in text
    assert "17" not in text
    assert (got == Code.OK) == (code == Code.OK)
    if code in (Code.INTERNAL, Code.UNKNOWN):
        assert (got, text) == (Code.UNAVAILABLE, LOST_TEXT)


def test_a_full_queue_of_serve_has_a_hint_too() -> None:
    assert retry_after_of(BUSY_TEXT) == 1.0
    assert shown(Code.RESOURCE_EXHAUSTED, "Request dropped (num_queued_requests=3)")[1] == BUSY_TEXT


@pytest.mark.parametrize(
    "text",
    [
        "The actor died unexpectedly before finishing this task.\n\tclass_name: ServeReplica:twot",
        "The actor 1e5f is unavailable: The actor is temporarily unavailable. IP:  Port: 0",
        "ray::ServeReplica.handle_request() (pid=17, ip=10.0.0.7)",
        "Traceback (most recent call last): ...",
        "Unexpected <class 'google.protobuf.message.DecodeError'>: Error parsing message",
    ],
)
@pytest.mark.parametrize("code", [Code.INTERNAL, Code.UNKNOWN, Code.UNAVAILABLE])
def test_a_client_shows_nothing_of_a_platform(code: Code, text: str) -> None:
    assert client_status(code, text) == (Code.UNAVAILABLE, LOST_TEXT)
    assert is_lost(client_status(code, text)[1])


@pytest.mark.parametrize("who", ["Received message", "SERVER: Received message", "Sent message"])
def test_a_message_that_is_too_long_is_no_lack_of_room(who: str) -> None:
    got = client_status(Code.RESOURCE_EXHAUSTED, f"{who} larger than max (80000000 vs. 4194304)")
    text = "message: got 80000000, expected at most 4194304 bytes"
    assert got == (Code.INVALID_ARGUMENT, text)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (Code.INVALID_ARGUMENT, "stop[0]: got 'ray::x', expected a string of 1 to 256 characters"),
        (Code.UNAVAILABLE, "failed to connect to all addresses"),
        (Code.RESOURCE_EXHAUSTED, "too many requests are waiting; retry after 1 s"),
        (Code.INTERNAL, f"{INTERNAL_TEXT} ray::1"),
        (Code.INTERNAL, "unexpected HTTP status code received from server: 502 (Bad Gateway)"),
    ],
)
def test_other_texts_stay_as_they_are(code: Code, text: str) -> None:
    assert client_status(code, text) == (code, text)
    assert not is_lost(text)
