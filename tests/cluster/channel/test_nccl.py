"""NCCL's member without a GPU: how it waits, and what it asks of a pair. With two: conformance."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.channel import NCCL, device_of
from twotower.cluster.channel.nccl import settle
from twotower.cluster.channel.process_group import GroupEnd, Rendezvous, join
from twotower.cluster.topology import PairTopology, Transport
from twotower.towers.engine.options import EngineOptions

PAIR = PairTopology("model", "cuda", "bfloat16", EngineOptions(), 0.4, 1.0, transport="nccl")


class Transfer:
    """Ends at the given look; `failure` is what torch tells then."""

    def __init__(self, looks: float, failure: Exception | None = None) -> None:
        self.looks = looks
        self.failure = failure
        self.waited = 0

    def is_completed(self) -> bool:
        self.looks -= 1
        return self.looks <= 0

    def wait(self) -> bool:
        assert self.looks <= 0, "waited for what has not ended: that would block"
        self.waited += 1
        if self.failure is not None:
            raise self.failure
        return True


def never() -> None:
    raise AssertionError("aborted")


def test_a_transfer_is_looked_at_until_it_ends() -> None:
    work = Transfer(looks=5)
    settle(work, never, 30.0)
    assert work.looks == 0
    assert work.waited == 1


def test_a_transfer_that_fails_is_told() -> None:
    with pytest.raises(RuntimeError, match="remote process exited"):
        settle(Transfer(3, RuntimeError("remote process exited")), never, 30.0)


def test_a_transfer_that_hangs_is_aborted() -> None:
    aborted: list[float] = []
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=r"Timed out: a transfer took more than 0\.2 s"):
        settle(Transfer(float("inf")), lambda: aborted.append(time.monotonic()), 0.2)
    assert len(aborted) == 1
    assert aborted[0] - begin >= 0.2


def test_towers_that_share_a_gpu_are_refused() -> None:
    assert PAIR.bundles()[1]["GPU"] == 1.0
    with pytest.raises(ValueError, match=r"gpus_per_tower: got 0\.5 for 'nccl', expected a whole"):
        replace(PAIR, gpus_per_tower=0.5)
    assert replace(PAIR, gpus_per_tower=0.5, transport="grpc").bundles()[1]["GPU"] == 0.5


async def both_ends(transport: Transport) -> tuple[GroupEnd, GroupEnd]:
    rendezvous = Rendezvous("127.0.0.1")
    try:
        receiver, sender = await asyncio.gather(
            rendezvous.accept(transport, device_of(transport, sender=False), 30.0),
            join(transport, "127.0.0.1", rendezvous.port, device_of(transport, sender=True), 30.0),
        )
    finally:
        rendezvous.close()
    return receiver, sender


def numbers(size: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randint(256, (size,), dtype=torch.uint8, generator=generator).to(device)


@pytest.mark.parametrize("transport", ["gloo", NCCL])
async def test_messages_pair_by_their_order(transport: Any) -> None:
    """Sizes mixed, several on the way at once."""
    receiver, sender = await both_ends(transport)
    sizes = [1, 8 << 20, 3, 4097, 1 << 20]
    sent = [numbers(size, sender.device) for size in sizes]
    got = [torch.zeros(size, dtype=torch.uint8, device=receiver.device) for size in sizes]
    sending = [sender.send(one) for one in sent]
    await asyncio.gather(*(receiver.receive(one) for one in got), *sending)
    for want, one in zip(sent, got, strict=True):
        assert torch.equal(want.cpu(), one.cpu())
    receiver.close()
    sender.close()


@pytest.mark.parametrize("transport", ["gloo", NCCL])
async def test_a_transfer_without_its_peer_ends_when_the_group_is_left(transport: Any) -> None:
    receiver, sender = await both_ends(transport)
    waiting = receiver.receive(torch.zeros(1 << 20, dtype=torch.uint8, device=receiver.device))
    await asyncio.sleep(0.2)
    assert not waiting.done()
    receiver.close()
    sender.close()
    async with asyncio.timeout(30):
        with pytest.raises((RuntimeError, asyncio.CancelledError)):
            await waiting


@pytest.mark.parametrize("transport", [NCCL])
async def test_bytes_are_sent_once_they_are_computed(transport: Any) -> None:
    """What is queued on the default stream before the call is waited for."""
    receiver, sender = await both_ends(transport)
    busy = torch.randn(4096, 4096, device=sender.device)
    tensor = torch.zeros(8 << 20, dtype=torch.uint8, device=sender.device)
    data = torch.full((8 << 20,), 9, dtype=torch.uint8, device=receiver.device)
    with torch.cuda.device(sender.device):
        for _ in range(50):
            busy = busy @ busy.softmax(-1)
        tensor.fill_(7)
    await asyncio.gather(sender.send(tensor), receiver.receive(data))
    assert bool((data == 7).all())
    receiver.close()
    sender.close()
