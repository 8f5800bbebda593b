"""The state channel over real loopback sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import grpc
import grpc.aio
import pytest
import torch

from tests.cluster.test_framing import make_update
from twotower.cluster.channel import framing
from twotower.cluster.channel.grpc import (
    ADMITTED_KEY,
    TOKEN_KEY,
    GrpcStateLink,
    LinkSpec,
    StateReceiver,
)
from twotower.protos.v1 import state_pb2, state_pb2_grpc
from twotower.towers.errors import UnavailableError
from twotower.towers.state import StateUpdate

TOKEN = "a" * 32
MAX_BYTES = 1 << 22
WEIGHTS = {"a_log": torch.arange(6.0).reshape(2, 3), "conv_weight": torch.ones(2, 5, 4)}
APPLIED = state_pb2.StateReceipt.OUTCOME_APPLIED
IGNORED = state_pb2.StateReceipt.OUTCOME_IGNORED
STALE = state_pb2.StateReceipt.OUTCOME_STALE
REFUSED = state_pb2.StateReceipt.OUTCOME_REFUSED


class Mirrors:
    """Stands in for a denoiser engine: keeps what arrives, refuses gaps as a mirror does."""

    def __init__(self) -> None:
        self.updates: list[tuple[str, StateUpdate]] = []
        self.positions: dict[str, int] = {}
        self.weights: list[Mapping[str, torch.Tensor]] = []

    def follow(self, tensors: Mapping[str, torch.Tensor]) -> None:
        if "a_log" not in tensors:
            raise ValueError("replay weights: no a_log")
        self.weights.append(tensors)

    def receive(self, row_id: str, update: StateUpdate) -> None:
        if update.start not in (0, self.positions.get(row_id, 0)):
            raise ValueError("gap")
        self.positions[row_id] = update.position
        self.updates.append((row_id, update))


class Bench:
    """A receiver, the mirrors behind it, and links to it."""

    def __init__(self, receiver: StateReceiver, mirrors: Mirrors, address: str) -> None:
        self.receiver = receiver
        self.mirrors = mirrors
        self.address = address
        self._links: list[GrpcStateLink] = []

    def link(self, *rows: str, epoch: int = 1, token: str = TOKEN) -> GrpcStateLink:
        spec = LinkSpec(self.address, token, epoch)
        link = GrpcStateLink(spec, WEIGHTS, receipt_timeout_s=10.0)
        for row in rows:
            link.open(row)
        self._links.append(link)
        return link

    def open(self, *rows: str) -> None:
        for row in rows:
            self.receiver.open(row)

    async def close(self) -> None:
        for link in self._links:
            await link.close()
        await self.receiver.stop()

    async def raw(self, *frames: state_pb2.StateFrame, receipts: int = 1) -> list[int]:
        """Writes frames as they are; outcomes of so many receipts. Raises AioRpcError."""
        async with grpc.aio.insecure_channel(self.address) as channel:
            stub: Any = state_pb2_grpc.StateChannelStub(channel)
            call = stub.Publish(metadata=((TOKEN_KEY, TOKEN),))
            for frame in frames:
                await call.write(frame)
            return [(await call.read()).outcome for _ in range(receipts)]


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    mirrors = Mirrors()
    receiver = StateReceiver(mirrors.receive, mirrors.follow, TOKEN, MAX_BYTES)
    made = Bench(receiver, mirrors, await receiver.start("127.0.0.1"))
    yield made
    await made.close()


def frames_of(update: StateUpdate, **header: Any) -> list[state_pb2.StateFrame]:
    fields = {"row_id": "a", "sequence": 0, "epoch": 1, "block_index": 0, **header}
    first = state_pb2.StateFrame(header=framing.make_header(update, **fields))
    return [first, *(state_pb2.StateFrame(payload=p) for p in framing.payloads(update.tensors))]


async def test_replay_weights_come_once_and_first(bench: Bench) -> None:
    bench.open("a")
    link = bench.link("a")
    await link.send("a", make_update(0, 4))
    await link.send("a", make_update(4, 8))
    (weights,) = bench.mirrors.weights
    assert set(weights) == set(WEIGHTS)
    assert all(torch.equal(weights[name], WEIGHTS[name]) for name in WEIGHTS)


async def test_replay_weights_of_another_model_end_the_stream(bench: Bench) -> None:
    header = framing.make_weights_header({"dt_bias": torch.zeros(2)}, epoch=1)
    frames = [state_pb2.StateFrame(header=header), state_pb2.StateFrame(payload=bytes(8))]
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await bench.raw(*frames)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert bench.mirrors.weights == []


async def test_interleaved_rows_arrive_whole_and_in_order(bench: Bench) -> None:
    rows = [f"row-{index}" for index in range(16)]
    bench.open(*rows)
    link = bench.link(*rows)

    async def follow(number: int, row: str) -> None:
        for block in range(6):
            await link.send(row, make_update(block * 4, block * 4 + 4, fill=number * 100 + block))
            assert bench.mirrors.positions[row] == block * 4 + 4

    await asyncio.gather(*(follow(number, row) for number, row in enumerate(rows)))
    for number, row in enumerate(rows):
        own = [update for name, update in bench.mirrors.updates if name == row]
        assert [update.position for update in own] == [4, 8, 12, 16, 20, 24]
        for block, update in enumerate(own):
            assert torch.all(update.tensors["v"] == number * 100 + block)


async def test_a_slow_receiver_holds_the_sender_back(bench: Bench) -> None:
    """Updates of several MB pass through the HTTP/2 window one by one, none is lost."""
    bench.open("a")
    link = bench.link("a")
    values = (MAX_BYTES // 4) - 64
    for block in range(4):
        tensors = {"k": torch.full((values,), float(block))}
        await link.send("a", StateUpdate(start=block, position=block + 1, tensors=tensors))
    assert [update.tensors["k"][-1].item() for _, update in bench.mirrors.updates] == [0, 1, 2, 3]


async def test_a_cancelled_send_leaves_the_stream_whole(bench: Bench) -> None:
    bench.open("a", "b")
    link = bench.link("a", "b")
    big = StateUpdate(start=0, position=1, tensors={"k": torch.ones(MAX_BYTES // 4 - 64)})
    task = asyncio.create_task(link.send("a", big))
    await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await link.send("b", make_update(0, 4))
    link.check()
    assert bench.mirrors.positions["b"] == 4


async def test_released_rows_are_neither_sent_nor_remembered(bench: Bench) -> None:
    bench.open("a")
    link = bench.link("a", "gone")
    await link.send("gone", make_update(0, 4))
    bench.receiver.forget("a")
    await link.send("a", make_update(0, 4))
    link.forget("a")
    await link.send("a", make_update(4, 8))
    assert bench.mirrors.updates == []
    assert bench.receiver.num_rows == 0


async def test_an_old_epoch_is_ignored(bench: Bench) -> None:
    bench.open("a")
    old, new = bench.link("a", epoch=1), bench.link("a", epoch=2)
    await old.send("a", make_update(0, 4, fill=1))
    await new.send("a", make_update(0, 4, fill=2))
    with pytest.raises(UnavailableError, match="taken its place"):
        await old.send("a", make_update(4, 8, fill=1))
    await new.send("a", make_update(4, 8, fill=2))
    fills = [update.tensors["v"].flatten()[0].item() for _, update in bench.mirrors.updates]
    assert fills == [1, 2, 2]
    with pytest.raises(UnavailableError):
        old.check()


async def test_duplicates_are_ignored_and_gaps_refused(bench: Bench) -> None:
    bench.open("a")
    first, second = make_update(0, 4), make_update(4, 8)
    outcomes = await bench.raw(
        *frames_of(first, sequence=0, block_index=0),
        *frames_of(first, sequence=1, block_index=0),
        *frames_of(second, sequence=2, block_index=2),
        *frames_of(make_update(6, 8), sequence=3, block_index=1),
        *frames_of(second, sequence=4, block_index=1),
        *frames_of(second, sequence=5, block_index=0, row_id="unknown"),
        *frames_of(second, sequence=6, block_index=2, epoch=0),
        receipts=7,
    )
    assert outcomes == [APPLIED, IGNORED, REFUSED, REFUSED, APPLIED, IGNORED, STALE]
    assert bench.mirrors.positions == {"a": 8}
    assert len(bench.mirrors.updates) == 2


async def test_the_sender_learns_of_a_gap(bench: Bench) -> None:
    bench.open("a")
    link = bench.link("a")
    await link.send("a", make_update(0, 4))
    with pytest.raises(UnavailableError, match="refused"):
        await link.send("a", make_update(6, 8))


@pytest.mark.parametrize("token", ["", "b" * 32, TOKEN[:-1]])
async def test_a_wrong_token_is_refused(bench: Bench, token: str) -> None:
    bench.open("a")
    link = bench.link("a", token=token)
    with pytest.raises(UnavailableError, match="UNAUTHENTICATED"):
        await link.send("a", make_update(0, 4))
    assert bench.mirrors.updates == []


def corrupt_header() -> list[state_pb2.StateFrame]:
    frames = frames_of(make_update(0, 4))[:1]
    frames[0].header.tensors[0].bytes += 4
    return frames


def oversized_header() -> list[state_pb2.StateFrame]:
    frames = frames_of(make_update(0, 4))[:1]
    frames[0].header.tensors[0].shape[:] = [1 << 20]
    frames[0].header.tensors[0].bytes = 1 << 22
    return frames


@pytest.mark.parametrize(
    ("frames", "code", "named"),
    [
        (corrupt_header(), grpc.StatusCode.INVALID_ARGUMENT, "conv"),
        (oversized_header(), grpc.StatusCode.RESOURCE_EXHAUSTED, "expected at most"),
        (frames_of(make_update(0, 4))[1:2], grpc.StatusCode.INVALID_ARGUMENT, "without a header"),
        (
            frames_of(make_update(0, 4))[:1] * 2,
            grpc.StatusCode.INVALID_ARGUMENT,
            "inside an update",
        ),
        (
            [*frames_of(make_update(0, 4))[:1], state_pb2.StateFrame(payload=b"x" * 5000)],
            grpc.StatusCode.INVALID_ARGUMENT,
            "5000 bytes",
        ),
    ],
)
async def test_broken_frames_end_their_stream_only(
    bench: Bench, frames: list[state_pb2.StateFrame], code: grpc.StatusCode, named: str
) -> None:
    bench.open("a", "b")
    link = bench.link("b")
    await link.send("b", make_update(0, 4))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await bench.raw(*frames)
    assert caught.value.code() == code
    assert named in (caught.value.details() or "")
    await link.send("b", make_update(4, 8))
    assert bench.mirrors.positions == {"b": 8}


async def test_bytes_that_are_no_frame_end_their_stream_only(bench: Bench) -> None:
    bench.open("b")
    async with grpc.aio.insecure_channel(bench.address) as channel:
        call = channel.stream_stream("/twotower.v1.StateChannel/Publish")(
            iter([b"\xff" * 64]), metadata=((TOKEN_KEY, TOKEN),)
        )
        with pytest.raises(grpc.aio.AioRpcError):
            async for _ in call:
                pass
    link = bench.link("b")
    await link.send("b", make_update(0, 4))
    assert bench.mirrors.positions == {"b": 4}


async def test_death_of_the_receiver_fails_what_is_sent(bench: Bench) -> None:
    bench.open("a")
    link = bench.link("a")
    await link.send("a", make_update(0, 4))
    await bench.receiver.stop()
    with pytest.raises(UnavailableError, match="broken"):
        await link.send("a", make_update(4, 8))
    with pytest.raises(UnavailableError):
        link.check()


async def test_death_of_the_receiver_fails_what_is_on_the_way() -> None:
    """The receiver dies while it holds an update without a receipt."""
    entered, stay = asyncio.Event(), asyncio.Event()

    class Hanging(state_pb2_grpc.StateChannelServicer):
        async def Publish(self, frames: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
            await context.send_initial_metadata(((ADMITTED_KEY, "1"),))
            async for _ in frames:
                entered.set()
                await stay.wait()
            yield state_pb2.StateReceipt()

    server = grpc.aio.server()
    state_pb2_grpc.add_StateChannelServicer_to_server(Hanging(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    link = GrpcStateLink(LinkSpec(f"127.0.0.1:{port}", TOKEN, 1), {})
    link.open("a")
    sending = asyncio.create_task(link.send("a", make_update(0, 4)))
    await asyncio.wait_for(entered.wait(), 10)
    await server.stop(grace=None)
    with pytest.raises(UnavailableError, match="broken"):
        await asyncio.wait_for(sending, 10)
    await link.close()


async def test_a_silent_receiver_is_given_up() -> None:
    class Silent(state_pb2_grpc.StateChannelServicer):
        async def Publish(self, frames: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
            await context.send_initial_metadata(((ADMITTED_KEY, "1"),))
            async for _ in frames:
                pass
            yield state_pb2.StateReceipt()

    server = grpc.aio.server()
    state_pb2_grpc.add_StateChannelServicer_to_server(Silent(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    link = GrpcStateLink(LinkSpec(f"127.0.0.1:{port}", TOKEN, 1), {}, receipt_timeout_s=0.2)
    link.open("a")
    with pytest.raises(UnavailableError, match="does not answer"):
        await link.send("a", make_update(0, 4))
    with pytest.raises(UnavailableError):
        link.check()
    await link.close()
    await server.stop(grace=None)
