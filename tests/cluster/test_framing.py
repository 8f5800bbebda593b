"""Headers and payloads: what is written is read back, and what is wrong is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from twotower.cluster.channel import framing
from twotower.protos.v1 import state_pb2
from twotower.towers.state import StateUpdate


def make_update(
    start: int, position: int, fill: float = 1.0, dtype: torch.dtype = torch.float32
) -> StateUpdate:
    """A small update with recognisable values; `v` is a view with strides."""
    wide = torch.full((2, 3, position + 5, 4), fill, dtype=dtype)
    return StateUpdate(
        start=start,
        position=position,
        tensors={
            "conv": torch.arange(24, dtype=dtype).reshape(2, 3, 4) + fill,
            "ssm": torch.full((2, 4, 4, 2), fill, dtype=torch.float32),
            "k": wide[:, :, start:position].clone(),
            "v": wide[:, :, start:position],
        },
    )


def header_of(update: StateUpdate) -> state_pb2.StateHeader:
    return framing.make_header(update, row_id="row", sequence=0, epoch=1, block_index=0)


def reassembled(update: StateUpdate) -> StateUpdate:
    header = state_pb2.StateHeader.FromString(header_of(update).SerializeToString())
    framing.check_header(header, max_bytes=1 << 30)
    assembly = framing.Assembly(header, keep=True)
    for payload in framing.payloads(update.tensors):
        assert len(payload) <= framing.CHUNK_BYTES
        assembly.feed(payload)
    return assembly.update()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_cross_bit_by_bit(dtype: torch.dtype) -> None:
    update = make_update(3, 9, dtype=dtype)
    update.tensors["ssm"][0, 0, 0, 0] = float("nan")
    result = reassembled(update)
    assert (result.start, result.position) == (3, 9)
    for name, tensor in update.tensors.items():
        received = result.tensors[name]
        assert received.dtype == tensor.dtype
        assert received.shape == tensor.shape
        sent_bytes = tensor.contiguous().view(torch.uint8)
        assert torch.equal(received.contiguous().view(torch.uint8), sent_bytes)


def test_large_tensors_are_cut() -> None:
    rows = framing.CHUNK_BYTES // 4
    update = StateUpdate(start=0, position=1, tensors={"k": torch.randn(3, rows - 1)})
    sizes = [len(payload) for payload in framing.payloads(update.tensors)]
    assert sizes == [framing.CHUNK_BYTES, framing.CHUNK_BYTES, framing.CHUNK_BYTES - 12]
    assert torch.equal(reassembled(update).tensors["k"], update.tensors["k"])


def test_empty_tensors_need_no_payload() -> None:
    update = make_update(0, 0)
    result = reassembled(update)
    assert result.tensors["k"].shape == (2, 3, 0, 4)


def test_own_memory() -> None:
    update = make_update(0, 2)
    result = reassembled(update)
    update.tensors["conv"].zero_()
    assert result.tensors["conv"][0, 0, 0] == 1.0


Mutation = Callable[[state_pb2.StateHeader], object]


@pytest.mark.parametrize(
    ("mutate", "named"),
    [
        (lambda h: setattr(h, "row_id", ""), "expected one of .*conv_weight"),
        (lambda h: setattr(h, "row_id", "x" * 257), "row_id"),
        (lambda h: setattr(h, "start", 10), "start"),
        (lambda h: setattr(h.tensors[0], "name", "weights"), "tensors"),
        (lambda h: setattr(h.tensors[1], "name", "conv"), "twice"),
        (lambda h: setattr(h.tensors[0], "dtype", "object"), "dtype"),
        (lambda h: setattr(h.tensors[0], "bytes", 5), "conv"),
        (lambda h: h.tensors[2].shape.append(2), "k"),
        (lambda h: h.tensors[0].shape.extend([1] * 6), "dimensions"),
    ],
)
def test_corrupt_headers_are_refused(mutate: Mutation, named: str) -> None:
    header = header_of(make_update(0, 9))
    mutate(header)
    with pytest.raises(framing.FrameError, match=named):
        framing.check_header(header, max_bytes=1 << 30)


def test_oversized_headers_are_refused_by_their_sum() -> None:
    update = make_update(0, 9)
    header = header_of(update)
    framing.check_header(header, max_bytes=update.num_bytes)
    with pytest.raises(framing.OversizedError, match="expected at most"):
        framing.check_header(header, max_bytes=update.num_bytes - 1)


def test_payload_that_does_not_fit_is_refused() -> None:
    assembly = framing.Assembly(header_of(make_update(0, 1)), keep=True)
    with pytest.raises(framing.FrameError, match="expected 1 to 96"):
        assembly.feed(b"x" * 97)
    with pytest.raises(framing.FrameError, match="got 0 bytes"):
        assembly.feed(b"")
