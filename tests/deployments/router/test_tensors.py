"""Tensors of KServe's messages: both forms of elements, and what is refused."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from twotower.deployments.router.tensors import named_values, with_outputs
from twotower.protos.kserve import inference_pb2 as pb
from twotower.towers.errors import InvalidRequestError

KNOWN = {"text": ("BYTES",), "ids": ("INT32", "INT64"), "flag": ("BOOL",)}


def request(
    *tensors: tuple[str, str, list[int], dict[str, Any]], raw: tuple[bytes, ...] = ()
) -> pb.ModelInferRequest:
    made = pb.ModelInferRequest(raw_input_contents=raw)
    for name, datatype, shape, contents in tensors:
        made.inputs.add(
            name=name, datatype=datatype, shape=shape, contents=pb.InferTensorContents(**contents)
        )
    return made


def test_typed_elements() -> None:
    made = request(
        ("text", "BYTES", [1], {"bytes_contents": ["ä".encode()]}),
        ("ids", "INT64", [1, 3], {"int64_contents": [1, -2, 2**62]}),
        ("flag", "BOOL", [1], {"bool_contents": [True]}),
    )
    assert named_values(made, KNOWN) == {
        "text": ["ä".encode()],
        "ids": [1, -2, 2**62],
        "flag": [True],
    }


def test_raw_elements() -> None:
    made = request(
        ("text", "BYTES", [2], {}),
        ("ids", "INT32", [2], {}),
        ("flag", "BOOL", [1], {}),
        raw=(b"\x02\0\0\0ab\0\0\0\0", b"\x01\0\0\0\xff\xff\xff\xff", b"\x01"),
    )
    assert named_values(made, KNOWN) == {"text": [b"ab", b""], "ids": [1, -1], "flag": [True]}


def test_no_elements_are_a_tensor_too() -> None:
    assert named_values(request(("ids", "INT32", [0], {})), KNOWN) == {"ids": []}
    assert named_values(request(), KNOWN) == {}


FOUR = {"int_contents": [1, 2, 3, 4]}
WRONG: list[tuple[pb.ModelInferRequest, str]] = [
    (request(("what", "BYTES", [1], {})), "inputs: got 'what', expected one of text, ids, flag"),
    (
        request(("ids", "INT32", [0], {}), ("ids", "INT32", [0], {})),
        "ids: got 'two inputs', expected one of that name",
    ),
    (
        request(("ids", "FP32", [1], {})),
        "ids.datatype: got 'FP32', expected INT32 or INT64",
    ),
    (request(("ids", "INT32", [], FOUR)), r"ids.shape: got \[\], expected \[n\] or \[1, n\]"),
    (request(("ids", "INT32", [2, 2], FOUR)), r"ids.shape: got \[2, 2\], expected"),
    (request(("ids", "INT32", [1, 1, 4], FOUR)), r"ids.shape: got \[1, 1, 4\], expected"),
    (request(("ids", "INT32", [-1], FOUR)), r"ids.shape: got \[-1\], expected"),
    (request(("ids", "INT32", [3], FOUR)), "ids: got '4 elements', expected 3, as its shape says"),
    (request(("ids", "INT32", [2**62], FOUR)), "ids: got '4 elements', expected 46116"),
    # Elements in the field of another type are none.
    (request(("ids", "INT64", [4], FOUR)), "ids: got '0 elements', expected 4"),
    (
        request(("ids", "INT32", [1], {}), raw=(b"\0" * 4, b"")),
        "raw_input_contents: got 2, expected 1, as there are inputs",
    ),
    (request(("ids", "INT32", [1], {}), raw=(b"\0" * 5,)), "ids: got '5 bytes', expected a mul"),
    (request(("ids", "INT64", [1], {}), raw=(b"\0" * 4,)), "ids: got '4 bytes', expected a mul"),
    (
        request(("text", "BYTES", [1], {}), raw=(b"\x09\0\0\0ab",)),
        "text: got '6 bytes', expected 13 for the element that begins at 0",
    ),
    (
        request(("text", "BYTES", [1], {}), raw=(b"\x01\0\0\0a\0\0",)),
        "text: got '7 bytes', expected 9 for the element that begins at 5",
    ),
]


@pytest.mark.parametrize(("made", "text"), WRONG)
def test_what_is_refused_is_named(made: pb.ModelInferRequest, text: str) -> None:
    with pytest.raises(InvalidRequestError, match=text):
        named_values(made, KNOWN)


def test_outputs_are_raw() -> None:
    response = pb.ModelInferResponse()
    with_outputs(
        response, [("t", "BYTES", ["ä", ""]), ("i", "INT32", [1, 258]), ("e", "INT32", [])]
    )
    assert [(out.name, out.datatype, list(out.shape)) for out in response.outputs] == [
        ("t", "BYTES", [2]),
        ("i", "INT32", [2]),
        ("e", "INT32", [0]),
    ]
    assert response.raw_output_contents[0] == struct.pack("<I", 2) + "ä".encode() + bytes(4)
    assert response.raw_output_contents[1:] == [b"\x01\0\0\0\x02\x01\0\0", b""]
