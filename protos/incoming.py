"""Checks of incoming bytes before they are parsed: their length, and whether they are a message.

gRPC answers a message that it cannot parse with UNKNOWN and the name of a Python class. Here the
parser gives a refusal in place of a message instead, and the handler answers with that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from twotower.protos.refusals import too_long

# gRPC's own default, which Serve's proxies replace by 2 GiB unless this variable says otherwise. A
# message is in memory before it can be looked at here.
MAX_MESSAGE_BYTES = 4 << 20
MESSAGE_VARIABLE = "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE"
# Where Serve's own limit has to be higher, for answers: the longest request that is taken.
REQUEST_VARIABLE = "TWOTOWER_MAX_REQUEST_BYTES"
# What gRPC counts with 31 bits.
MOST_MESSAGE_BYTES = (1 << 31) - 1
# Of a message: an id in a list of token ids, and all that is neither prompt nor earlier output: 16
# stop strings of 256 characters are the most of it.
_ID_BYTES = 5
_REST_BYTES = 64 << 10
# Of an answer of Score, for each token: its id, its log-probability, and 20 alternatives.
_SCORE_BYTES = 200
_MANY_PROMPTS = 64 << 20


def longest_body(message_bytes: int) -> int:
    """The longest body by HTTP where messages have up to `message_bytes`: JSON takes up to three
    times as much for a prompt, and a body has several prompts, as far as that is not very much."""
    return max(3 * message_bytes, min(16 * message_bytes, _MANY_PROMPTS))


@dataclass(frozen=True)
class Refusal:
    """Stands for a message that was not taken: the text that its sender reads."""

    details: str


Parser = Callable[[bytes], Any]


def message_limit(environment: Mapping[str, str]) -> int:
    """The longest message that a proxy takes from a client: ours, else what Serve reads there too,
    else gRPC's default."""
    for name in (REQUEST_VARIABLE, MESSAGE_VARIABLE):
        given = environment.get(name, "")
        if given.isdecimal():
            return int(given)
    return MAX_MESSAGE_BYTES


def answer_limit(environment: Mapping[str, str]) -> int:
    """The longest message that a proxy sends: what Serve reads there."""
    given = environment.get(MESSAGE_VARIABLE, "")
    return int(given) if given.isdecimal() else MOST_MESSAGE_BYTES


def message_variables(request_bytes: int, max_context: int) -> dict[str, str]:
    """The environment of a proxy that takes requests of so many bytes and sends the answers to
    them."""
    most = max(request_bytes, longest_answer(max_context))
    return {REQUEST_VARIABLE: str(request_bytes), MESSAGE_VARIABLE: str(most)}


def longest_answer(max_context: int) -> int:
    """Bytes of the longest message that answers a request of so many tokens: a score of all with
    the most alternatives that may be asked for."""
    return min(_SCORE_BYTES * max_context + _REST_BYTES, MOST_MESSAGE_BYTES)


def longest_request(max_context: int, token_bytes: int | None) -> int:
    """Bytes of the longest message that a request of so many tokens can be.

    `token_bytes` is the most text that a token can stand for, None if it is not known: then gRPC's
    default, or what ids need if that is more.
    """
    ids = _ID_BYTES * max_context
    if token_bytes is None:
        return max(MAX_MESSAGE_BYTES, 2 * ids + _REST_BYTES)
    prompt = max(ids, token_bytes * max_context)
    return min(prompt + ids + _REST_BYTES, MOST_MESSAGE_BYTES)


def careful(parse: Parser, max_bytes: int) -> Parser:
    """A parser that gives a Refusal for what is too long or no message of the kind."""

    def parsed(raw: bytes) -> Any:
        if len(raw) > max_bytes:
            return Refusal(str(too_long(len(raw), max_bytes)))
        try:
            return parse(raw)
        except DecodeError:
            return Refusal(f"message: got {len(raw)} bytes that are no message of this method")

    return parsed


class CarefulServer:
    """A gRPC server as generated code sees it when it registers a service.

    Its handlers get the parser above; `max_bytes` is the longest message that is taken.
    """

    def __init__(self, server: Any, max_bytes: int) -> None:
        self._server = server
        self._max_bytes = max_bytes

    def add_generic_rpc_handlers(self, _handlers: Any) -> None:
        """Does nothing: the same handlers come by name, and can be changed there."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        """Registers a service's methods both ways, as generated code does."""
        changed = {
            name: handler._replace(
                request_deserializer=careful(handler.request_deserializer, self._max_bytes)
            )
            for name, handler in handlers.items()
        }
        generic = grpc.method_handlers_generic_handler(service, changed)
        self._server.add_generic_rpc_handlers((generic,))
        self._server.add_registered_method_handlers(service, changed)
