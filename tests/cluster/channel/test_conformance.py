"""What every transport of the state channel guarantees; one suite for all of them."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.channel import (
    CONFIG,
    DTYPE,
    NCCL,
    TOKEN,
    TRANSPORTS,
    Channel,
    Recorder,
    assert_holds,
    is_let_go,
    num_unfinished,
    references,
    send,
    shares_of,
    some_plans,
    until,
)
from twotower.cluster.channel import framing, receiver
from twotower.cluster.channel.grpc import GrpcStateLink, LinkSpec
from twotower.towers.errors import UnavailableError
from twotower.towers.state.update import UpdatePlan

ROOT = Path(__file__).parents[3]
# About 4 MiB: more than a frame and than HTTP/2's windows hold.
LARGE = UpdatePlan("kv", 0, 4096)
SMALL = UpdatePlan("snapshot", 0, 4)
NEXT = UpdatePlan("delta", 4, 8)


@pytest.fixture(params=[*TRANSPORTS, NCCL])
async def channel(request: pytest.FixtureRequest) -> AsyncIterator[Channel]:
    made = Channel(request.param, Recorder())
    await made.start()
    yield made
    async with asyncio.timeout(20):
        await made.close()


def remote_only(channel: Channel, why: str) -> None:
    if channel.transport == "in_process":
        pytest.skip(f"in one process there is no {why}")


async def test_updates_of_a_row_arrive_in_order_and_whole(channel: Channel) -> None:
    channel.open("a")
    link = channel.link("a")
    plans = some_plans(6, random.Random(1))
    for seed, plan in enumerate(plans):
        await send(link, "a", plan, seed)
        assert channel.recorder.positions["a"] == plan.position
    assert [update.plan for update in channel.recorder.of("a")] == plans
    for seed, (plan, update) in enumerate(zip(plans, channel.recorder.of("a"), strict=True)):
        assert_holds(update, shares_of(plan, seed))


async def test_replay_weights_come_once_and_first(channel: Channel) -> None:
    channel.open("a")
    link = channel.link("a", weights={"a_log": torch.randn(700, 600), "dt_bias": torch.ones(3)})
    await send(link, "a", SMALL)
    await send(link, "a", NEXT)
    (weights,) = channel.recorder.weights
    assert set(weights) == {"a_log", "dt_bias"}
    assert weights["a_log"].shape == (700, 600)


@pytest.mark.parametrize("rows", [1, 8, 64])
async def test_rows_interleave_layer_by_layer(channel: Channel, rows: int) -> None:
    """The shares of all rows' updates come mixed, in any order among rows."""
    chooser = random.Random(rows)
    names = [f"row-{number}" for number in range(rows)]
    channel.open(*names)
    link = channel.link(*names)
    plans = {name: some_plans(3, chooser, most=4000 // rows) for name in names}
    for block in range(3):
        writers = {name: link.begin(name, None, plans[name][block]) for name in names}
        waiting = {name: shares_of(plans[name][block], seed) for seed, name in enumerate(names)}
        while waiting:
            name = chooser.choice(list(waiting))
            writers[name].put(*waiting[name].pop(0))
            if not waiting[name]:
                del waiting[name]
            if chooser.random() < 0.2:
                await asyncio.sleep(0)
        await asyncio.gather(*(writer.finish() for writer in writers.values()))
    for seed, name in enumerate(names):
        updates = channel.recorder.of(name)
        assert [update.plan for update in updates] == plans[name]
        for update in updates:
            assert_holds(update, shares_of(update.plan, seed))


async def test_shares_come_from_another_thread(channel: Channel) -> None:
    channel.open("a")
    link = channel.link("a")
    writer = link.begin("a", None, LARGE)
    shares = shares_of(LARGE, 3)
    await asyncio.to_thread(lambda: [writer.put(*share) for share in shares])
    await writer.finish()
    assert_holds(channel.recorder.of("a")[0], shares)


@pytest.mark.parametrize("plan", [SMALL, LARGE])
async def test_after_finish_a_share_may_change(channel: Channel, plan: UpdatePlan) -> None:
    channel.open("a")
    link = channel.link("a")
    writer = link.begin("a", None, plan)
    shares = shares_of(plan, 1)
    given = [(name, layer, share.clone()) for name, layer, share in shares]
    for share in given:
        writer.put(*share)
    writer.put("other", 0, torch.zeros(3))
    await writer.finish()
    for _, _, own in given:
        own.zero_()
    assert_holds(channel.recorder.of("a")[0], shares)


async def test_shares_of_any_strides_and_dtype(channel: Channel) -> None:
    """As a pass has them: views of pages, and an `ssm` that stays fp32."""
    channel.open("a")
    link = channel.link("a")
    writer = link.begin("a", None, SMALL)
    shares = shares_of(SMALL, 2)
    for name, layer, share in shares:
        wide = torch.zeros(*share.shape[:-1], share.shape[-1] * 2, dtype=torch.float64)
        wide[..., ::2] = share
        writer.put(name, layer, wide[..., ::2])
    await writer.finish()
    assert_holds(channel.recorder.of("a")[0], shares)


async def test_a_large_update_travels_before_it_is_complete(channel: Channel) -> None:
    remote_only(channel, "wire")
    channel.open("a")
    link = channel.link("a")
    writer = link.begin("a", None, LARGE)
    shares = shares_of(LARGE, 0)
    for share in shares[:2]:
        writer.put(*share)
    await until(lambda: num_unfinished() == 1)
    assert channel.recorder.updates == []
    for share in shares[2:]:
        writer.put(*share)
    # Everything has been computed, but only `finish` says that it may be applied.
    await asyncio.sleep(0.05)
    assert channel.recorder.updates == []
    await writer.finish()
    assert num_unfinished() == 0
    assert_holds(channel.recorder.of("a")[0], shares)


async def test_misuse_is_named(channel: Channel) -> None:
    channel.open("a")
    link = channel.link("a")
    writer = link.begin("a", None, SMALL)
    with pytest.raises(ValueError, match="before the last one has finished"):
        link.begin("a", None, NEXT)
    with pytest.raises(ValueError, match="lacks shares"):
        await writer.finish()
    with pytest.raises(ValueError, match="expected layer 0"):
        writer.put("k", 1, torch.zeros(1, 4, 64))
    with pytest.raises(ValueError, match=r"shape \[1, 3, 64\], expected \[1, 4, 64\]"):
        writer.put("k", 0, torch.zeros(1, 3, 64))


async def test_an_aborted_update_leaves_the_mirror(channel: Channel) -> None:
    channel.open("a")
    link = channel.link("a")
    for begun in (False, True):
        writer = link.begin("a", None, LARGE)
        shares = shares_of(LARGE, 0)
        for share in shares[:3] if begun else []:
            writer.put(*share)
        if begun and channel.receiver is not None:
            await until(lambda: num_unfinished() == 1)
        writer.abort()
        for share in shares[3:] if begun else shares:
            writer.put(*share)
        await writer.finish()
    assert channel.recorder.updates == []
    await send(link, "a", SMALL)
    assert channel.recorder.positions == {"a": 4}
    if channel.receiver is not None:
        assert num_unfinished() == 0


async def test_abort_after_finish_does_nothing(channel: Channel) -> None:
    channel.open("a")
    link = channel.link("a")
    writer = link.begin("a", None, SMALL)
    for share in shares_of(SMALL, 0):
        writer.put(*share)
    await writer.finish()
    writer.abort()
    await send(link, "a", NEXT)
    assert channel.recorder.positions == {"a": 8}


async def test_a_row_forgotten_on_the_way_leaves_nothing(channel: Channel) -> None:
    channel.open("a", "b")
    link = channel.link("a", "b")
    writer = link.begin("a", None, LARGE)
    shares = shares_of(LARGE, 0)
    for share in shares[:3]:
        writer.put(*share)
    if channel.receiver is not None:
        await until(lambda: num_unfinished() == 1)
        channel.receiver.forget("a")
        assert num_unfinished() == 0
    link.forget("a")
    for share in shares[3:]:
        writer.put(*share)
    await writer.finish()
    held = references(shares)
    del shares, share, writer
    await send(link, "a", SMALL)
    await send(link, "b", SMALL)
    assert channel.recorder.positions == {"b": 4}
    if channel.receiver is not None:
        assert channel.receiver.num_rows == 1
        assert is_let_go(held)


async def test_a_receiver_that_does_not_follow_throws_bytes_away(channel: Channel) -> None:
    remote_only(channel, "receiver of its own")
    channel.open("b")
    link = channel.link("a", "b")
    await send(link, "a", LARGE)
    await send(link, "b", SMALL)
    assert channel.recorder.positions == {"b": 4}


async def test_a_cancelled_finish_leaves_the_stream_whole(channel: Channel) -> None:
    channel.open("a", "b")
    link = channel.link("a", "b")
    writer = link.begin("a", None, LARGE)
    for share in shares_of(LARGE, 0):
        writer.put(*share)
    finishing = asyncio.create_task(writer.finish())
    await asyncio.sleep(0)
    finishing.cancel()
    await asyncio.gather(finishing, return_exceptions=True)
    writer.abort()
    await send(link, "b", SMALL)
    await until(lambda: channel.recorder.positions == {"a": 4096, "b": 4})


async def test_a_gap_is_refused_and_told(channel: Channel) -> None:
    channel.open("a")
    link = channel.link("a")
    await send(link, "a", SMALL)
    for wrong in (UpdatePlan("delta", 6, 8), UpdatePlan("delta", 0, 4)):
        with pytest.raises(UnavailableError, match="refused"):
            await send(link, "a", wrong)
    assert channel.recorder.positions == {"a": 4}


async def test_an_older_link_is_fenced_off(channel: Channel) -> None:
    remote_only(channel, "second link")
    channel.open("a")
    old, new = channel.link("a", epoch=1), channel.link("a", epoch=2)
    await send(old, "a", SMALL)
    writer = old.begin("a", None, UpdatePlan("kv", 4, 4096))
    shares = shares_of(UpdatePlan("kv", 4, 4096), 0)
    for share in shares[:3]:
        writer.put(*share)
    await until(lambda: num_unfinished() == 1)
    await send(new, "a", NEXT)
    assert num_unfinished() == 0
    for share in shares[3:]:
        writer.put(*share)
    with pytest.raises(UnavailableError, match="taken its place"):
        await writer.finish()
    with pytest.raises(UnavailableError):
        old.check()
    await send(new, "a", UpdatePlan("delta", 8, 9))
    assert channel.recorder.positions == {"a": 9}


@pytest.mark.parametrize("token", ["", "b" * 32, TOKEN[:-1]])
async def test_a_wrong_token_is_refused(channel: Channel, token: str) -> None:
    remote_only(channel, "token")
    channel.open("a")
    with pytest.raises(UnavailableError, match="UNAUTHENTICATED"):
        await send(channel.link("a", token=token), "a", SMALL)
    assert channel.recorder.updates == []


def stall(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Receivers take no frame until the event is set."""
    gate, take = asyncio.Event(), receiver._Stream.take

    async def gated(self: receiver._Stream, raw: bytes) -> Any:
        await gate.wait()
        return await take(self, raw)

    monkeypatch.setattr(receiver._Stream, "take", gated)
    return gate


async def test_back_pressure_bounds_what_the_sender_holds(
    channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A receiver that stands still stops the senders; nothing is lost."""
    remote_only(channel, "wire")
    gate = stall(monkeypatch)
    rows = [f"row-{number}" for number in range(6)]
    channel.open(*rows)
    link = channel.link(*rows)
    shares = shares_of(LARGE, 1)

    begun: list[str] = []

    async def carry(row: str) -> None:
        for seed, plan in ((1, LARGE), (2, UpdatePlan("kv", 4096, 4100))):
            begun.append(row)
            await send(link, row, plan, seed)

    carrying = [asyncio.create_task(carry(row)) for row in rows]
    await asyncio.sleep(0.3)
    assert not any(task.done() for task in carrying)
    # The first update of each row, and no second.
    assert begun == rows
    gate.set()
    await asyncio.gather(*carrying)
    for row in rows:
        assert_holds(channel.recorder.of(row)[0], shares)
        assert channel.recorder.positions[row] == 4100
    assert sorted(begun) == sorted(rows * 2)


async def test_the_receiver_dies_before_the_first_update(channel: Channel) -> None:
    remote_only(channel, "peer")
    link = channel.link("a")
    await channel.receiver.stop()
    with pytest.raises(UnavailableError, match="broken"):
        await send(link, "a", SMALL)


async def test_the_receiver_dies_between_header_and_rest(channel: Channel) -> None:
    remote_only(channel, "peer")
    channel.open("a")
    link = channel.link("a")
    writer = link.begin("a", None, LARGE)
    shares = shares_of(LARGE, 0)
    for share in shares[:3]:
        writer.put(*share)
    await until(lambda: num_unfinished() == 1)
    await channel.receiver.stop()
    for share in shares[3:]:
        writer.put(*share)
    with pytest.raises(UnavailableError, match="broken"):
        await writer.finish()
    with pytest.raises(UnavailableError, match="broken"):
        link.begin("a", None, SMALL)
    assert num_unfinished() == 0
    assert channel.recorder.updates == []


async def test_the_receiver_dies_before_the_receipt(
    channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote_only(channel, "peer")
    stall(monkeypatch)
    channel.open("a")
    link = channel.link("a")
    sending = asyncio.create_task(send(link, "a", SMALL))
    await asyncio.sleep(0.2)
    assert not sending.done()
    await channel.receiver.stop()
    with pytest.raises(UnavailableError, match="broken"):
        await sending
    with pytest.raises(UnavailableError, match="broken"):
        link.check()


@pytest.mark.parametrize("transport", [*TRANSPORTS[1:], NCCL])
@pytest.mark.parametrize("plan", [SMALL, UpdatePlan("kv", 0, 16384)])
async def test_a_silent_receiver_is_given_up(
    transport: str, plan: UpdatePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = stall(monkeypatch)
    silent = Channel(transport, Recorder(), timeout_s=0.5)
    await silent.start()
    silent.open("a")
    link = silent.link("a")
    with pytest.raises(UnavailableError, match=r"does not answer|nothing moved|Timed out"):
        await send(link, "a", plan)
    with pytest.raises(UnavailableError):
        link.check()
    gate.set()
    await silent.close()


async def test_a_sender_that_leaves_mid_update_leaves_nothing(channel: Channel) -> None:
    remote_only(channel, "peer")
    channel.open("a")
    link = channel.link("a")
    writer = link.begin("a", None, LARGE)
    for share in shares_of(LARGE, 0)[:3]:
        writer.put(*share)
    await until(lambda: num_unfinished() == 1)
    await link.close()
    await until(lambda: num_unfinished() == 0)
    await send(channel.link("a", epoch=2), "a", SMALL)
    assert channel.recorder.positions == {"a": 4}


DYING_SENDER = """
import asyncio, os, sys
from tests.support.channel import CONFIG, DTYPE, TOKEN, WEIGHTS, device_of, shares_of
from twotower.cluster.channel.grpc import GrpcStateLink, LinkSpec
from twotower.towers.state.update import UpdatePlan

async def main(address, transport, certificate):
    device = device_of(transport, sender=True)
    spec = LinkSpec(address, TOKEN, 1, transport, certificate.encode() or None)
    link = GrpcStateLink(spec, CONFIG, DTYPE, WEIGHTS, device=device)
    link.open("a")
    plan = UpdatePlan("kv", 0, 4096)
    writer = link.begin("a", None, plan)
    for share in shares_of(plan, 0)[:3]:
        writer.put(*share)
    await asyncio.sleep(60)

asyncio.run(main(*sys.argv[1:]))
"""


async def test_a_killed_sender_leaves_nothing(channel: Channel) -> None:
    remote_only(channel, "peer")
    channel.open("a")
    arguments = ["-c", DYING_SENDER, channel.address, channel.transport]
    arguments.append((channel.certificate or b"").decode())
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, cwd=ROOT)
    try:
        await until(lambda: num_unfinished() == 1, 40)
    finally:
        process.kill()
        await process.wait()
    await until(lambda: num_unfinished() == 0)
    await send(channel.link("a", epoch=2), "a", SMALL)
    assert channel.recorder.positions == {"a": 4}


@pytest.mark.parametrize("field", ["shape", "bytes"])
async def test_a_bad_header_breaks_the_link(
    channel: Channel, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a sender that is otherwise sound, over every wire."""
    remote_only(channel, "header")
    make = framing.make_header

    def spoiled(*args: Any, **fields: Any) -> Any:
        header = make(*args, **fields)
        spec = header.tensors[0]
        spec.shape[0] *= 1 << 20
        spec.bytes *= (1 << 20) if field == "shape" else 1
        return header

    monkeypatch.setattr(framing, "make_header", spoiled)
    channel.open("a")
    link = channel.link("a")
    # A write that meets the end of the stream may hide the code; test_receiver.py checks codes.
    with pytest.raises(UnavailableError, match="broken"):
        await send(link, "a", SMALL)
    with pytest.raises(UnavailableError, match="broken"):
        link.check()
    assert channel.recorder.updates == []


async def test_replay_weights_of_another_model_break_the_link(channel: Channel) -> None:
    weights = {"dt_bias": torch.zeros(2)}
    channel.open("a")
    if channel.transport == "in_process":
        with pytest.raises(ValueError, match="a_log"):
            channel.link("a", weights=weights)
    else:
        with pytest.raises(UnavailableError, match="broken"):
            await send(channel.link("a", weights=weights), "a", SMALL)
    assert channel.recorder.weights == []
    assert channel.recorder.updates == []


async def test_both_sides_must_use_one_transport(channel: Channel) -> None:
    remote_only(channel, "wire")
    other = "nccl" if channel.transport == "gloo" else "gloo"
    spec = LinkSpec(channel.address, TOKEN, 1, other, channel.certificate)
    link = GrpcStateLink(spec, CONFIG, DTYPE, {})
    link.open("a")
    with pytest.raises(UnavailableError, match=f"transport: got '{other}'"):
        await send(link, "a", SMALL)
    await link.close()
