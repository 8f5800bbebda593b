"""Tensors of KServe's messages: their elements, raw or typed, as Python values, and back.

Raw elements are little-endian numbers, or texts with 4 bytes of length before each. A request has
all its elements in one form.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from twotower.protos.kserve import inference_pb2 as pb
from twotower.towers.errors import InvalidRequestError

_LENGTH = struct.Struct("<I")
_NUMBERS = {"BOOL": np.dtype("?"), "INT32": np.dtype("<i4"), "INT64": np.dtype("<i8")}
# Where a tensor's contents have the elements of a type.
_FIELDS = {
    "BOOL": "bool_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "BYTES": "bytes_contents",
}

# Named tensors: type, sizes and elements.
Output = tuple[str, str, Sequence[Any]]


def named_values(
    request: pb.ModelInferRequest, known: dict[str, tuple[str, ...]]
) -> dict[str, list[Any]]:
    """The elements of each input; `known` has the types that an input of a name may be of.

    Shapes are [n] or [1, n]. Raises InvalidRequestError, naming the input, for any that is not
    known, comes twice or has elements that are not of its type and shape.
    """
    found: dict[str, list[Any]] = {}
    for tensor, raw in zip(request.inputs, _raw_contents(request), strict=True):
        if tensor.name not in known:
            raise InvalidRequestError("inputs", tensor.name, f"one of {', '.join(known)}")
        if tensor.name in found:
            raise InvalidRequestError(tensor.name, "two inputs", "one of that name")
        if tensor.datatype not in known[tensor.name]:
            types = " or ".join(known[tensor.name])
            raise InvalidRequestError(f"{tensor.name}.datatype", tensor.datatype, types)
        found[tensor.name] = _values(tensor, _count(tensor), raw)
    return found


def with_outputs(response: pb.ModelInferResponse, outputs: Sequence[Output]) -> None:
    """Adds tensors [n] of BYTES, whose elements are texts, or of INT32, raw."""
    for name, datatype, values in outputs:
        shape = [len(values)]
        response.outputs.add(name=name, datatype=datatype, shape=shape)
        response.raw_output_contents.append(_raw(datatype, values))


def _raw_contents(request: pb.ModelInferRequest) -> Sequence[bytes | None]:
    """Raw elements of each input; None for inputs that have typed ones."""
    if not request.raw_input_contents:
        return [None] * len(request.inputs)
    count = len(request.raw_input_contents)
    if count != len(request.inputs):
        limit = f"{len(request.inputs)}, as there are inputs"
        raise InvalidRequestError("raw_input_contents", count, limit)
    return request.raw_input_contents


def _count(tensor: pb.ModelInferRequest.InferInputTensor) -> int:
    shape = list(tensor.shape[:3])
    if not 1 <= len(shape) <= 2 or shape[-1] < 0 or shape[:-1] not in ([], [1]):
        raise InvalidRequestError(f"{tensor.name}.shape", shape, "[n] or [1, n]")
    return shape[-1]


def _values(
    tensor: pb.ModelInferRequest.InferInputTensor, count: int, raw: bytes | None
) -> list[Any]:
    if raw is None:
        values: list[Any] = list(getattr(tensor.contents, _FIELDS[tensor.datatype]))
    elif tensor.datatype == "BYTES":
        values = list(_texts(tensor.name, raw))
    else:
        dtype = _NUMBERS[tensor.datatype]
        if len(raw) % dtype.itemsize:
            limit = f"a multiple of {dtype.itemsize}"
            raise InvalidRequestError(tensor.name, f"{len(raw)} bytes", limit)
        values = np.frombuffer(raw, dtype).tolist()
    if len(values) != count:
        limit = f"{count}, as its shape says"
        raise InvalidRequestError(tensor.name, f"{len(values)} elements", limit)
    return values


def _texts(name: str, raw: bytes) -> Iterator[bytes]:
    """The elements of a BYTES tensor."""
    place = 0
    while place < len(raw):
        begin = place + _LENGTH.size
        end = begin + (_LENGTH.unpack_from(raw, place)[0] if begin <= len(raw) else 0)
        if max(begin, end) > len(raw):
            limit = f"{max(begin, end)} for the element that begins at {place}"
            raise InvalidRequestError(name, f"{len(raw)} bytes", limit)
        yield raw[begin:end]
        place = end


def _raw(datatype: str, values: Sequence[Any]) -> bytes:
    if datatype != "BYTES":
        return np.asarray(values, _NUMBERS[datatype]).tobytes()
    encoded = [value.encode() for value in values]
    return b"".join(_LENGTH.pack(len(each)) + each for each in encoded)
