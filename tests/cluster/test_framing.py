"""Frames and headers: what is written is read back, and what is wrong is refused."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from twotower.cluster.channel import framing
from twotower.cluster.channel.assembly import Assembly
from twotower.cluster.channel.outgoing import Pieces
from twotower.protos.v1 import state_pb2
from twotower.towers.update import UpdatePlan

PLAN = UpdatePlan("snapshot", 3, 9)


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        "conv": torch.randn(2, 3, 4).to(dtype),
        "ssm": torch.randn(2, 4, 4, 2),
        "k": torch.randn(2, 3, 6, 4).to(dtype),
        "v": torch.randn(2, 3, 6, 4).to(dtype),
    }


def header_of(parts: dict[str, Tensor], plan: UpdatePlan = PLAN) -> state_pb2.StateHeader:
    return framing.make_header(plan, parts, row_id="row", epoch=1, block_index=2)


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16383, 16384, 1 << 20])
def test_a_frame_is_what_protobuf_reads_and_writes(size: int) -> None:
    """The payload is put on by hand; protobuf's own writer and parser are the truth."""
    payload = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    header = header_of(tensors())
    pieces = [framing.Piece(1, 70000, size)] if size else []
    raw = framing.encode(300, pieces, [payload[:5], payload[5:]], header, finished=True)
    expected = state_pb2.StateFrame(sequence=300, header=header, finished=True)
    for piece in pieces:
        expected.pieces.add(tensor=1, offset=70000, size=piece.size)
    expected.payload = payload.tobytes()
    assert state_pb2.StateFrame.FromString(raw) == expected
    for written in (raw, expected.SerializeToString()):
        control, got = framing.decode(written)
        assert bytes(got) == payload.tobytes()
        assert control.payload == b""
        control.payload = bytes(got)
        assert control == expected


def test_fields_may_come_in_any_order() -> None:
    parts = [
        state_pb2.StateFrame(payload=b"abc").SerializeToString(),
        state_pb2.StateFrame(sequence=7).SerializeToString(),
        state_pb2.StateFrame(pieces=[state_pb2.Piece(size=3)]).SerializeToString(),
    ]
    random.Random(0).shuffle(parts)
    control, payload = framing.decode(b"".join(parts))
    assert (control.sequence, control.pieces[0].size, bytes(payload)) == (7, 3, b"abc")


def test_bytes_that_are_no_frame_are_refused() -> None:
    whole = framing.encode(1, [framing.Piece(0, 0, 200)], [np.zeros(200, np.uint8)])
    for cut in range(1, 200):
        with pytest.raises(framing.FrameError, match="expected a StateFrame"):
            framing.decode(whole[:-cut])


def test_a_second_payload_is_refused() -> None:
    with pytest.raises(framing.FrameError, match="second"):
        framing.decode(state_pb2.StateFrame(payload=b"abc").SerializeToString() * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("limit", [1, 7, 64, 1 << 20])
def test_tensors_cross_bit_by_bit(dtype: torch.dtype, limit: int) -> None:
    parts = tensors(dtype)
    parts["ssm"][0, 0, 0, 0] = float("nan")
    header = state_pb2.StateHeader.FromString(header_of(parts).SerializeToString())
    framing.check_header(header, max_bytes=1 << 30)
    source, assembly = Pieces(parts.values()), Assembly(header, keep=True)
    while pieces := source.take(source.sizes(), limit):
        assert sum(piece.size for piece in pieces) <= limit
        assert not assembly.complete
        sent = [state_pb2.Piece(tensor=p.tensor, offset=p.offset, size=p.size) for p in pieces]
        for place, data in zip(assembly.place(sent), source.slices(pieces), strict=True):
            place.copy_(data)
    update = assembly.update()
    assert update.plan == PLAN
    for name, tensor in parts.items():
        got = update.tensors[name]
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(got.view(torch.uint8), tensor.view(torch.uint8))


def test_pieces_are_cut_from_what_is_final() -> None:
    source = Pieces([torch.zeros(10, dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8)])
    assert source.take([3, 0], 100) == [framing.Piece(0, 0, 3)]
    assert source.take([3, 0], 100) == []
    assert source.take([10, 4], 8) == [framing.Piece(0, 3, 7), framing.Piece(1, 0, 1)]
    assert source.take([10, 4], 8) == [framing.Piece(1, 1, 3)]


def test_an_assembly_that_is_not_kept_only_counts() -> None:
    header = header_of(tensors())
    for kept in (False, True):
        assembly = Assembly(header, keep=kept)
        assembly.discard()
        for index, spec in enumerate(header.tensors):
            piece = state_pb2.Piece(tensor=index, size=spec.bytes)
            assert assembly.place([piece]) == [None]
        assert assembly.complete


Mutation = Callable[[state_pb2.StateHeader], object]


@pytest.mark.parametrize(
    ("mutate", "named"),
    [
        (lambda h: setattr(h, "row_id", ""), "expected one of .*conv_weight"),
        (lambda h: setattr(h, "row_id", "x" * 257), "row_id"),
        (lambda h: setattr(h, "start", 10), "start"),
        (lambda h: setattr(h, "kind", 0), "kind"),
        (lambda h: setattr(h, "kind", 9), "kind"),
        (lambda h: setattr(h, "kind", state_pb2.UPDATE_KIND_DELTA), "expected one of .*xbc"),
        (lambda h: setattr(h.tensors[0], "name", "weights"), "tensors"),
        (lambda h: setattr(h.tensors[1], "name", "conv"), "twice"),
        (lambda h: setattr(h.tensors[0], "dtype", "object"), "dtype"),
        (lambda h: setattr(h.tensors[0], "bytes", 5), "conv"),
        (lambda h: h.tensors[2].shape.append(2), "k"),
        (lambda h: h.tensors[0].shape.extend([1] * 6), "dimensions"),
    ],
)
def test_corrupt_headers_are_refused(mutate: Mutation, named: str) -> None:
    header = header_of(tensors())
    framing.check_header(header, max_bytes=1 << 30)
    mutate(header)
    with pytest.raises(framing.FrameError, match=named):
        framing.check_header(header, max_bytes=1 << 30)


def test_oversized_headers_are_refused_by_their_sum() -> None:
    parts = tensors()
    total = sum(tensor.nbytes for tensor in parts.values())
    framing.check_header(header_of(parts), max_bytes=total)
    with pytest.raises(framing.OversizedError, match="expected at most"):
        framing.check_header(header_of(parts), max_bytes=total - 1)


def test_a_dtype_that_the_wire_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        header_of({"k": torch.zeros(1, dtype=torch.float64)})
