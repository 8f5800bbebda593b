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
from twotower.cluster.channel.carrier import InFrame
from twotower.cluster.channel.outgoing import ShareQueue
from twotower.protos.v1 import state_pb2
from twotower.towers.state.update import UpdatePlan

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
@pytest.mark.parametrize("limit", [1, 7, 64, 200, 1 << 20])
@pytest.mark.parametrize("whole", [False, True])
async def test_tensors_cross_bit_by_bit(dtype: torch.dtype, limit: int, whole: bool) -> None:
    """However the sender queues them: layer by layer or a tensor at once."""
    parts = tensors(dtype)
    parts["ssm"][0, 0, 0, 0] = float("nan")
    header = state_pb2.StateHeader.FromString(header_of(parts).SerializeToString())
    framing.check_header(header, max_bytes=1 << 30)
    queue, carrier, assembly = ShareQueue(), InFrame(), Assembly(header, keep=True)
    for layer in range(1 if whole else 2):
        for index, tensor in enumerate(parts.values()):
            share = tensor if whole else tensor[layer]
            queue.put(index, layer * share.nbytes, share)
    while (taken := queue.take(limit))[0]:
        pieces, slices = taken
        assert sum(piece.size for piece in pieces) <= limit
        assert not assembly.complete
        raw = framing.encode(1, pieces, carrier.payload(slices))
        frame, payload = framing.decode(raw)
        size = assembly.announce(frame.pieces)
        assembly.fill(frame.pieces, await carrier.receive(size, payload))
    update = assembly.update()
    assert update.plan == PLAN
    for name, tensor in parts.items():
        shares = update.tensors[name]
        assert {share.data_ptr() % share.itemsize for share in shares} == {0}
        got = torch.stack(list(shares))
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(got.view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize("sequence", [1, 127, 128, 300, 1 << 40])
@pytest.mark.parametrize("named", ["row", "another row", "a third one's name"])
async def test_a_share_that_fits_into_a_frame_is_read_where_it_arrived(
    sequence: int, named: str
) -> None:
    parts = tensors()
    header = framing.make_header(PLAN, parts, row_id=named, epoch=1, block_index=2)
    queue, carrier, assembly = ShareQueue(), InFrame(), Assembly(header, keep=True)
    for index, tensor in enumerate(parts.values()):
        queue.put(index, 0, tensor)
    pieces, slices = queue.take(1 << 20)
    raw = framing.encode(sequence, pieces, carrier.payload(slices), header)
    frame, payload = framing.decode(raw)
    data = await carrier.receive(assembly.announce(frame.pieces), payload)
    assembly.fill(frame.pieces, data)
    for _, _, share in assembly.update().parts():
        assert data.data_ptr() <= share.data_ptr() < data.data_ptr() + data.nbytes


def test_shares_travel_whole_where_they_fit() -> None:
    queue = ShareQueue()
    for tensor, offset, size in ((0, 0, 6), (1, 0, 2), (0, 6, 6), (1, 2, 2), (2, 0, 25)):
        queue.put(tensor, offset, torch.zeros(size, dtype=torch.uint8))
    queue.put(3, 0, torch.zeros(0))
    pieces, slices = queue.take(15)
    assert pieces == [framing.Piece(0, 0, 12), framing.Piece(1, 0, 2)]
    assert [one.nbytes for one in slices] == [6, 6, 2]
    assert queue.take(15)[0] == [framing.Piece(1, 2, 2)]
    assert queue.take(15)[0] == [framing.Piece(2, 0, 15)]
    assert queue.take(15)[0] == [framing.Piece(2, 15, 10)]
    assert queue.take(15) == ([], [])


def test_an_assembly_that_is_not_kept_only_counts() -> None:
    header = header_of(tensors())
    for kept in (False, True):
        assembly = Assembly(header, keep=kept)
        assembly.discard()
        for index, spec in enumerate(header.tensors):
            piece = state_pb2.Piece(tensor=index, size=spec.bytes)
            assert assembly.announce([piece]) == spec.bytes
            assembly.fill([piece], torch.zeros(spec.bytes, dtype=torch.uint8))
        assert not assembly.keep
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


@pytest.mark.parametrize("layers", [1, 1024, 1025])
def test_the_number_of_layers_is_bounded(layers: int) -> None:
    """A share is an object of its own: many small ones would cost more than their bytes."""
    header = header_of({**tensors(), "k": torch.zeros(layers, 1)})
    if layers <= framing.MAX_LAYERS:
        framing.check_header(header, max_bytes=1 << 30)
        return
    with pytest.raises(framing.FrameError, match="at most 1024 layers"):
        framing.check_header(header, max_bytes=1 << 30)


def test_a_tensor_without_layers_is_refused() -> None:
    with pytest.raises(framing.FrameError, match="layers"):
        framing.check_header(header_of({"k": torch.tensor(1.0)}), max_bytes=1 << 30)


def test_oversized_headers_are_refused_by_their_sum() -> None:
    parts = tensors()
    total = sum(tensor.nbytes for tensor in parts.values())
    framing.check_header(header_of(parts), max_bytes=total)
    with pytest.raises(framing.OversizedError, match="expected at most"):
        framing.check_header(header_of(parts), max_bytes=total - 1)


def test_a_dtype_that_the_wire_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        header_of({"k": torch.zeros(1, dtype=torch.float64)})
