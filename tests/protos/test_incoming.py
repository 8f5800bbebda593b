"""The parser in front of every method; how it meets gRPC and Serve is in test_ingress."""

from __future__ import annotations

import pytest

from twotower.protos.incoming import (
    MAX_MESSAGE_BYTES,
    MESSAGE_VARIABLE,
    Refusal,
    careful,
    message_limit,
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


def test_serve_knows_the_variable() -> None:
    from ray.serve._private import constants

    assert hasattr(constants, MESSAGE_VARIABLE)
    assert ("grpc.max_receive_message_length", getattr(constants, MESSAGE_VARIABLE)) in (
        constants.DEFAULT_GRPC_SERVER_OPTIONS
    )
