"""Frames written by hand: which a receiver takes, and which end their stream."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import torch

from tests.support.channel import CONFIG, DTYPE, Channel, Recorder, num_unfinished, send
from twotower.cluster.channel import framing
from twotower.protos.v1 import state_pb2
from twotower.towers.state.update import UpdatePlan

APPLIED = state_pb2.StateReceipt.OUTCOME_APPLIED
IGNORED = state_pb2.StateReceipt.OUTCOME_IGNORED
STALE = state_pb2.StateReceipt.OUTCOME_STALE
REFUSED = state_pb2.StateReceipt.OUTCOME_REFUSED
ABORTED = state_pb2.StateReceipt.OUTCOME_ABORTED
SMALL = UpdatePlan("snapshot", 0, 4)
NEXT = UpdatePlan("delta", 4, 8)


@pytest.fixture
async def channel() -> AsyncIterator[Channel]:
    made = Channel("grpc", Recorder())
    await made.start()
    yield made
    await made.close()


def frame(plan: UpdatePlan, sequence: int, row: str = "a", index: int = 0, epoch: int = 1) -> bytes:
    """A whole update of zeros as one frame."""
    tensors = plan.layout(CONFIG, DTYPE)
    header = framing.make_header(plan, tensors, row_id=row, epoch=epoch, block_index=index)
    pieces = [framing.Piece(i, 0, tensor.nbytes) for i, tensor in enumerate(tensors.values())]
    payload = [torch.zeros(piece.size, dtype=torch.uint8).numpy() for piece in pieces]
    return framing.encode(sequence, pieces, payload, header, finished=True)


def header_frame(plan: UpdatePlan = SMALL, sequence: int = 1, row: str = "a") -> Any:
    """The first frame of an update, without bytes."""
    parsed, _ = framing.decode(frame(plan, sequence, row))
    return state_pb2.StateFrame(sequence=sequence, header=parsed.header)


async def test_duplicates_are_ignored_and_gaps_refused_by_number(channel: Channel) -> None:
    channel.open("a")
    outcomes = await channel.raw(
        frame(SMALL, 1),
        frame(SMALL, 2),
        frame(NEXT, 3, index=2),
        frame(UpdatePlan("delta", 6, 8), 4, index=1),
        header_frame(NEXT, 5).SerializeToString(),
        framing.encode(5, aborted=True),
        frame(NEXT, 6, index=1),
        frame(NEXT, 7, row="unknown"),
        frame(NEXT, 8, index=2, epoch=0),
        receipts=8,
    )
    assert outcomes == [APPLIED, IGNORED, REFUSED, REFUSED, ABORTED, APPLIED, IGNORED, STALE]
    assert channel.recorder.positions == {"a": 8}
    assert len(channel.recorder.updates) == 2


def corrupt_header() -> Any:
    made = header_frame()
    made.header.tensors[0].bytes += 4
    return made


def oversized_header() -> Any:
    made = header_frame()
    made.header.tensors[0].shape[:] = [1, 1 << 22]
    made.header.tensors[0].bytes = 1 << 24
    return made


def with_piece(tensor: int, offset: int, size: int, data: int | None = None) -> Any:
    made = header_frame()
    made.pieces.add(tensor=tensor, offset=offset, size=size)
    made.payload = bytes(size if data is None else data)
    return made


def finished_early() -> Any:
    made = with_piece(0, 0, 96)
    made.finished = True
    return made


def overlapping() -> Any:
    return state_pb2.StateFrame(sequence=1, pieces=[state_pb2.Piece(size=4)], payload=bytes(4))


INVALID = grpc.StatusCode.INVALID_ARGUMENT
BROKEN = [
    ([corrupt_header()], INVALID, "conv"),
    ([oversized_header()], grpc.StatusCode.RESOURCE_EXHAUSTED, "expected at most"),
    ([state_pb2.StateFrame(sequence=9)], INVALID, "without a header"),
    ([header_frame()] * 2, INVALID, "inside update"),
    ([header_frame(), header_frame(sequence=2)], INVALID, "the last one's end"),
    ([with_piece(0, 4, 8)], INVALID, "expected one at 0"),
    (
        [with_piece(0, 0, 8), state_pb2.StateFrame(sequence=1, pieces=[{"size": 4}])],
        INVALID,
        "at 8",
    ),
    ([with_piece(0, 0, 5000)], INVALID, "5000 bytes"),
    ([with_piece(0, 0, 0)], INVALID, "0 bytes"),
    ([with_piece(9, 0, 8)], INVALID, "tensor 9"),
    ([with_piece(0, 0, 8, data=9)], INVALID, "payload"),
    ([finished_early()], INVALID, "missing"),
]


@pytest.mark.parametrize(("frames", "code", "named"), BROKEN)
async def test_broken_frames_end_their_stream_only(
    channel: Channel, frames: list[Any], code: grpc.StatusCode, named: str
) -> None:
    channel.open("a", "b")
    link = channel.link("b")
    await send(link, "b", SMALL)
    with pytest.raises(grpc.RpcError) as caught:
        await channel.raw(*(one.SerializeToString() for one in frames))
    assert caught.value.code() == code
    assert named in (caught.value.details() or "")
    assert num_unfinished() == 0
    await send(link, "b", NEXT)
    assert channel.recorder.positions == {"b": 8}


@pytest.mark.parametrize("raw", [b"\xff" * 64, b"\x32\x7f", b"\x08", b"\x0a\x01x"])
async def test_bytes_that_are_no_frame_end_their_stream_only(channel: Channel, raw: bytes) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        await channel.raw(raw)
    assert caught.value.code() == INVALID


async def test_replay_weights_of_another_model_are_refused(channel: Channel) -> None:
    header = framing.make_weights_header({"dt_bias": torch.zeros(2)}, epoch=1)
    pieces, payload = [framing.Piece(0, 0, 8)], [torch.zeros(8, dtype=torch.uint8).numpy()]
    with pytest.raises(grpc.RpcError) as caught:
        await channel.raw(framing.encode(0, pieces, payload, header, finished=True))
    assert caught.value.code() == INVALID
    assert "a_log" in (caught.value.details() or "")
    assert channel.recorder.weights == []
