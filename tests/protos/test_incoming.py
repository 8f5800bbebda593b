"""The parser in front of every method; how it meets gRPC and Serve is in test_ingress."""

from __future__ import annotations

import pytest

from twotower.protos.incoming import (
    MAX_MESSAGE_BYTES,
    MESSAGE_VARIABLE,
    REQUEST_VARIABLE,
    Refusal,
    answer_limit,
    careful,
    longest_answer,
    message_limit,
    message_variables,
)
from twotower.protos.v1 import generation_pb2 as pb

REQUEST = pb.GenerateRequest(text="größe", generated_token_ids=[1])


def test_a_message_is_parsed_up_to_the_limit_and_no_further() -> None:
    raw = REQUEST.SerializeToString()
    assert careful(pb.GenerateRequest.FromString, len(raw))(raw) == REQUEST
    refusal = careful(pb.GenerateRequest.FromString, len(raw) - 1)(raw)
    assert refusal == Refusal(f"message: got {len(raw)}, expected at most {len(raw) - 1} bytes")


@pytest.mark.parametrize("raw", [b"\xff", b"\x0a\xff", b"\x12\x01\xff", b"GET / HTTP/1.1"])
def test_what_is_no_message_names_no_class(raw: bytes) -> None:
    refusal = careful(pb.GenerateRequest.FromString, 100)(raw)
    assert refusal == Refusal(f"message: got {len(raw)} bytes that are no message of this method")


def test_an_error_of_the_parser_itself_is_not_hidden() -> None:
    def broken(_raw: bytes) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        careful(broken, 100)(b"")


@pytest.mark.parametrize(
    ("given", "limit"),
    [(None, MAX_MESSAGE_BYTES), ("65536", 65536), ("", MAX_MESSAGE_BYTES), ("-1", 4 << 20)],
)
def test_the_limit_is_what_serve_reads(given: str | None, limit: int) -> None:
    assert message_limit({} if given is None else {MESSAGE_VARIABLE: given}) == limit


def test_answers_may_be_longer_than_requests() -> None:
    long, short = message_variables(70_000, 32768), message_variables(9 << 20, 100)
    assert (message_limit(long), answer_limit(long)) == (70_000, longest_answer(32768))
    assert (message_limit(short), answer_limit(short)) == (9 << 20, 9 << 20)
    assert answer_limit({}) == (1 << 31) - 1
    assert message_limit({REQUEST_VARIABLE: "", MESSAGE_VARIABLE: "65536"}) == 65536


@pytest.mark.parametrize("count", [1, 300])
def test_the_longest_score_is_no_longer_than_that(count: int) -> None:
    most = 2**31 - 1
    top = pb.TopLogProbs(token_ids=[most] * 20, log_probs=[-1.5] * 20)
    score = pb.ScoreResponse(
        token_ids=[most] * count, log_probs=[-1.5] * count, top_log_probs=[top] * count
    )
    assert score.ByteSize() <= longest_answer(count)
    # And the limit is no guess: less than a tenth of it is room.
    assert score.ByteSize() > 0.9 * (longest_answer(count) - longest_answer(0))


def test_serve_knows_the_variable() -> None:
    from ray.serve._private import constants

    assert hasattr(constants, MESSAGE_VARIABLE)
    assert ("grpc.max_receive_message_length", getattr(constants, MESSAGE_VARIABLE)) in (
        constants.DEFAULT_GRPC_SERVER_OPTIONS
    )
