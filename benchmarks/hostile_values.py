"""Values that a client should not send: as JSON text, as protobuf messages, as bytes."""

from __future__ import annotations

import random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from twotower.deployments.http.bodies import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
)

# Valid bodies by path, each field as JSON text: cheap, as some of them come through.
BASES = {
    "/v1/completions": {"prompt": '"def f():"', "max_tokens": "2", "steps_per_block": "2"},
    "/v1/chat/completions": {"messages": '[{"role":"user","content":"a"}]', "max_tokens": "2"},
    "/tokenize": {"prompt": '"def f():"'},
    "/detokenize": {"tokens": "[5,6,7]"},
}
FIELDS = {
    path: tuple(model.model_fields)
    for path, model in zip(
        BASES, (CompletionBody, ChatBody, TokenizeBody, DetokenizeBody), strict=True
    )
}
NUMBERS = (
    *("0", "-0", "-1", "1", "1.0", "1.5", "-1.5", "1e-320", "1e999", "-1e999", "NaN", "Infinity"),
    *("-Infinity", "2147483647", "2147483648", "-2147483649", "9223372036854775807"),
    *("9223372036854775808", "18446744073709551616", "1" + "0" * 400, "1" + "0" * 5000, "01"),
)
TEXTS = (
    *('""', '"a"', '"\\ud800"', '"\\udfff\\ud800"', '"\\u0000"', '"\\ufeff"', '"\\x"', '"ar"'),
    *('"verified"', '"mock_ar"', '"<eos>"', '"\u202e\U0001f600"', '"' + "x" * 600 + '"', '"NaN"'),
)
OTHERS = (
    *("null", "true", "false", "[]", "{}", "[null]", "[[]]", "[[[]]]", '["a",1]', "[-1]", "[1.5]"),
    *("[2147483648]", "[true]", '{"":1}', '{"5":100}', '{"5":1e999}', '{"-1":1}', '{"a":{"b":[]}}'),
    *('{"5":"x"}', '[{"role":"user"}]', '{"include_usage":1}', '{"type":"json_object"}', "[[1],2]"),
)


def json_value(draw: random.Random) -> str:
    """A value of any type, as JSON text or as what resembles it."""
    return draw.choice(draw.choice((NUMBERS, TEXTS, OTHERS)))


def json_body(draw: random.Random, path: str) -> str:
    """A body whose fields are mostly right, and one to three of them not."""
    fields = dict(BASES[path])
    for name in draw.sample(FIELDS[path], min(len(FIELDS[path]), draw.randint(1, 3))):
        fields[name] = json_value(draw)
    return joined(list(fields.items()))


def joined(fields: list[tuple[str, str]]) -> str:
    """An object of these fields, which may repeat each other."""
    return "{" + ",".join(f'"{name}":{value}' for name, value in fields) + "}"


def nested(draw: random.Random) -> str:
    """Brackets in brackets, some of them never closed."""
    depth = draw.choice((50, 500, 5_000, 100_000))
    opening, closing = draw.choice((("[", "]"), ('{"a":', "}"), ('[{"prompt":', "}]")))
    inner = opening * depth + "1" + closing * (depth if draw.random() < 0.7 else depth // 2)
    return inner if draw.random() < 0.3 else joined([("prompt", inner), ("max_tokens", "1")])


_WHOLE = (-(2**31), -1, 0, 1, 2, 3, 1000, 2**31 - 1)
_LONG = (*_WHOLE, -(2**63), 2**63 - 1)
_REAL = (float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 0.5, 1.0, 1.5, -1.0, 1e308, 5e-324)
_WORDS = ("", "a", "ar", "verified", "mock_ar", "\0", "\u202e", "x" * 600, "\U0001f600" * 40)
_MAKERS: dict[int, Any] = {
    FieldDescriptor.CPPTYPE_INT32: _WHOLE,
    FieldDescriptor.CPPTYPE_INT64: _LONG,
    FieldDescriptor.CPPTYPE_DOUBLE: _REAL,
    FieldDescriptor.CPPTYPE_FLOAT: _REAL,
    FieldDescriptor.CPPTYPE_BOOL: (True, False),
    FieldDescriptor.CPPTYPE_STRING: _WORDS,
}
# Fields that make a request expensive stay small.
_CHEAP = {"max_tokens": (-(2**31), -1, 0, 1, 2, 2**31 - 1), "n": (-(2**31), -1, 0, 1, 2, 2**31 - 1)}


def spoil(draw: random.Random, message: Message, share: float = 0.15) -> None:
    """Sets a share of a message's fields, and of those of messages in it, to odd values."""
    for field in message.DESCRIPTOR.fields:
        if draw.random() >= share:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            for _ in range(draw.randint(0, 4)):
                getattr(message, field.name)[draw.choice(_WHOLE)] = draw.choice(_REAL)
        elif field.is_repeated:
            for _ in range(draw.choice((0, 1, 3, 40))):
                getattr(message, field.name).append(draw.choice(_MAKERS[field.cpp_type]))
        elif field.message_type is not None:
            spoil(draw, getattr(message, field.name), share)
        else:
            values = _CHEAP.get(field.name) or _MAKERS[field.cpp_type]
            setattr(message, field.name, draw.choice(values))


def damaged(draw: random.Random, raw: bytes) -> bytes:
    """The same bytes with some changed, lost or added."""
    changed = bytearray(raw)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(changed) + 1)
        how = draw.randrange(3)
        if how == 0:
            changed[place:place] = draw.randbytes(draw.randint(1, 8))
        elif how == 1 and changed:
            changed[place % len(changed)] = draw.randrange(256)
        else:
            del changed[place:]
    return bytes(changed)
