"""Frames of the state channel: how updates are laid out on the wire, and what is refused.

Nothing here opens a socket. `check_header` runs before a byte is allocated, so a corrupt or
oversized header costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from google.protobuf.message import DecodeError
from torch import Tensor

from twotower.protos.v1 import state_pb2
from twotower.towers.state.update import UpdateKind, UpdatePlan

CHUNK_BYTES = 1 << 20
MAX_ROW_ID = 256
MAX_DIMENSIONS = 8
MAX_LAYERS = 1024
STATE_TENSORS: dict[UpdateKind, frozenset[str]] = {
    "snapshot": frozenset(("conv", "ssm", "k", "v")),
    "delta": frozenset(("xbc", "dt", "k", "v")),
    "kv": frozenset(("k", "v")),
}
WEIGHT_TENSORS = frozenset(("conv_weight", "conv_bias", "a_log", "dt_bias"))
# What bytes.join takes: an object with the buffer protocol.
Memory = Any
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_KINDS: dict[UpdateKind, state_pb2.UpdateKind] = {
    "snapshot": state_pb2.UPDATE_KIND_SNAPSHOT,
    "delta": state_pb2.UPDATE_KIND_DELTA,
    "kv": state_pb2.UPDATE_KIND_KV,
}
_KIND_NAMES = {number: kind for kind, number in _KINDS.items()}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_SEQUENCE_TAG = state_pb2.StateFrame.SEQUENCE_FIELD_NUMBER << 3 | _VARINT
_PAYLOAD_TAG = state_pb2.StateFrame.PAYLOAD_FIELD_NUMBER << 3 | _BYTES

# Of the widest dtype on the wire.
_ALIGNMENT = 4


class FrameError(ValueError):
    """A frame breaks the channel's rules; the stream cannot go on."""


class OversizedError(FrameError):
    """A header announces more bytes than a row may have."""


@dataclass(frozen=True)
class Piece:
    """Bytes of one tensor of an update: its index in the header, bytes before it, its size."""

    tensor: int
    offset: int
    size: int


def make_header(
    plan: UpdatePlan, tensors: Mapping[str, Tensor], *, row_id: str, epoch: int, block_index: int
) -> state_pb2.StateHeader:
    """The header of an update. Raises ValueError for a dtype that frames do not carry."""
    return state_pb2.StateHeader(
        epoch=epoch,
        row_id=row_id,
        block_index=block_index,
        kind=_KINDS[plan.kind],
        start=plan.start,
        position=plan.position,
        tensors=[_spec(name, tensor) for name, tensor in tensors.items()],
    )


def make_weights_header(tensors: Mapping[str, Tensor], epoch: int) -> state_pb2.StateHeader:
    """The header that opens a link: the sender's replay weights, which belong to no row."""
    specs = [_spec(name, tensor) for name, tensor in tensors.items()]
    return state_pb2.StateHeader(epoch=epoch, tensors=specs)


def plan_of(header: state_pb2.StateHeader) -> UpdatePlan:
    """Kind, start and position of a row's update, from its checked header."""
    return UpdatePlan(_KIND_NAMES[header.kind], header.start, header.position)


def encode(
    sequence: int,
    pieces: Sequence[Piece] = (),
    payload: Sequence[Memory] = (),
    header: state_pb2.StateHeader | None = None,
    finished: bool = False,
    aborted: bool = False,
) -> bytes:
    """A serialized StateFrame; `payload` are the pieces' bytes, contiguous.

    Number and payload are put behind the other fields by hand: protobuf would copy the payload
    twice more, and the padded number lets it begin where the receiver reads it as tensors.
    """
    frame = state_pb2.StateFrame(header=header, finished=finished, aborted=aborted)
    for piece in pieces:
        frame.pieces.add(tensor=piece.tensor, offset=piece.offset, size=piece.size)
    length = sum(piece.size for piece in pieces) if payload else 0
    number, tail = _varint(sequence), b""
    if length:
        tail = bytes((_PAYLOAD_TAG,)) + _varint(length)
    start = frame.SerializeToString() + bytes((_SEQUENCE_TAG,))
    padding = -(len(start) + len(number) + len(tail)) % _ALIGNMENT
    start += _padded(number, padding) + tail
    return b"".join((start, *payload))


def decode(raw: bytes) -> tuple[state_pb2.StateFrame, memoryview]:
    """A serialized StateFrame without its payload, and the payload, not copied.

    Raises FrameError for bytes that are no StateFrame.
    """
    view = memoryview(raw)
    try:
        begin, payload, end = _find_payload(view)
        frame = state_pb2.StateFrame.FromString(raw[:begin] + raw[end:])
    except (DecodeError, IndexError) as error:
        raise FrameError(f"frame: got {len(raw)} bytes, expected a StateFrame") from error
    if frame.payload:
        raise FrameError("payload: got a second one, expected at most one in a frame")
    return frame, payload


def check_header(header: state_pb2.StateHeader, max_bytes: int) -> None:
    """Raises FrameError, or OversizedError above `max_bytes` of tensors."""
    if len(header.row_id) > MAX_ROW_ID:
        raise FrameError(
            f"row_id: got {len(header.row_id)} characters, expected at most {MAX_ROW_ID}"
        )
    if header.start > header.position:
        raise FrameError(f"start: got {header.start}, expected at most {header.position}")
    names, seen = _expected_names(header), set[str]()
    layered = bool(header.row_id)
    for spec in header.tensors:
        _check_spec(spec, names)
        if layered and not (spec.shape and spec.shape[0] <= MAX_LAYERS):
            raise FrameError(
                f"{spec.name}: got shape {list(spec.shape)}, expected at most {MAX_LAYERS} layers"
            )
        if spec.name in seen:
            raise FrameError(f"tensors: {spec.name} appears twice")
        seen.add(spec.name)
    total = sum(spec.bytes for spec in header.tensors)
    if total > max_bytes:
        raise OversizedError(f"tensors: got {total} bytes, expected at most {max_bytes}")


def _expected_names(header: state_pb2.StateHeader) -> frozenset[str]:
    if not header.row_id:
        return WEIGHT_TENSORS
    if header.kind not in _KIND_NAMES:
        raise FrameError(f"kind: got {header.kind}, expected one of {sorted(_KIND_NAMES)}")
    return STATE_TENSORS[_KIND_NAMES[header.kind]]


def _spec(name: str, tensor: Tensor) -> state_pb2.TensorSpec:
    if tensor.dtype not in _DTYPE_NAMES:
        raise ValueError(f"{name}: got {tensor.dtype}, expected one of {', '.join(DTYPES)}")
    return state_pb2.TensorSpec(
        name=name,
        dtype=_DTYPE_NAMES[tensor.dtype],
        shape=list(tensor.shape),
        bytes=tensor.nbytes,
    )


def _check_spec(spec: state_pb2.TensorSpec, names: frozenset[str]) -> None:
    if spec.name not in names:
        raise FrameError(f"tensors: got {spec.name[:40]!r}, expected one of {sorted(names)}")
    if spec.dtype not in DTYPES:
        raise FrameError(f"{spec.name}: got dtype {spec.dtype[:40]!r}, expected {list(DTYPES)}")
    if len(spec.shape) > MAX_DIMENSIONS:
        raise FrameError(
            f"{spec.name}: got {len(spec.shape)} dimensions, expected at most {MAX_DIMENSIONS}"
        )
    expected = math.prod(spec.shape) * DTYPES[spec.dtype].itemsize
    if spec.bytes != expected:
        raise FrameError(f"{spec.name}: got {spec.bytes} bytes, expected {expected} by its shape")


def _find_payload(view: memoryview) -> tuple[int, memoryview, int]:
    """Begin of the payload's field, the payload, end of the field; all at the end if there is none.

    Walks the top-level fields only.
    """
    place = 0
    while place < len(view):
        begin = place
        tag, place = _read_varint(view, place)
        kind = tag & 7
        if kind == _VARINT:
            _, place = _read_varint(view, place)
        elif kind == _BYTES:
            length, place = _read_varint(view, place)
            if place + length > len(view):
                raise IndexError("a field reaches past the frame's end")
            place += length
            if tag == _PAYLOAD_TAG:
                return begin, view[place - length : place], place
        elif kind in (_FIXED32, _FIXED64):
            place += 4 if kind == _FIXED32 else 8
        else:
            raise IndexError(f"wire type {kind}")
    return len(view), view[len(view) :], len(view)


def _varint(value: int) -> bytes:
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)


def _padded(varint: bytes, count: int) -> bytes:
    """The same number in `count` bytes more, zeros that any reader passes over."""
    if not count:
        return varint
    more = bytes((varint[-1] | 0x80,)) + b"\x80" * (count - 1)
    return varint[:-1] + more + b"\0"


def _read_varint(view: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = view[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place
        if shift > 63:
            raise IndexError("a number of more than 64 bits")
