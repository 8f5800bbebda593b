"""A link's self-test: what its known updates tell apart, and what it says over a faulty group."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import torch

from tests.support.channel import (
    CONFIG,
    DTYPE,
    NCCL,
    TOKEN,
    WEIGHTS,
    Channel,
    Recorder,
    device_of,
    num_unfinished,
    send,
)
from twotower.cluster.channel import process_group
from twotower.cluster.channel.grpc import GrpcStateLink, LinkSpec
from twotower.cluster.channel.self_test import (
    SELF_TEST_PLANS,
    has_known_values,
    known_shares,
)
from twotower.towers.errors import UnavailableError
from twotower.towers.state.update import StateUpdate, UpdatePlan

CPU = torch.device("cpu")
SNAPSHOT = UpdatePlan("snapshot", 0, 4)


def known_update(number: int, dtype: torch.dtype = torch.bfloat16) -> StateUpdate:
    tensors: dict[str, list[torch.Tensor]] = {}
    for name, _, share in known_shares(CONFIG, number, dtype, CPU):
        tensors.setdefault(name, []).append(share)
    return StateUpdate(SELF_TEST_PLANS[number], tensors)


@pytest.fixture(params=["grpc", "gloo", NCCL])
async def channel(request: pytest.FixtureRequest) -> AsyncIterator[Channel]:
    made = Channel(request.param, Recorder(), timeout_s=1.0)
    await made.start()
    yield made
    await made.close()


@pytest.fixture(params=["gloo", NCCL])
async def group(request: pytest.FixtureRequest) -> AsyncIterator[Channel]:
    made = Channel(request.param, Recorder(), timeout_s=1.0)
    await made.start()
    yield made
    await made.close()


def faulty(channel: Channel, fault: Any) -> GrpcStateLink:
    link = GrpcStateLink(
        LinkSpec(channel.address, TOKEN, 1, channel.transport),
        CONFIG,
        DTYPE,
        WEIGHTS,
        device=device_of(channel.transport, sender=True),
        receipt_timeout_s=1.0,
        fault=fault,
    )
    channel._links.append(link)
    return link


def test_every_kind_of_share_is_in_the_known_updates() -> None:
    names = {
        name for number in range(len(SELF_TEST_PLANS)) for name in known_update(number).tensors
    }
    assert names == {"conv", "ssm", "xbc", "dt", "k", "v"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_known_values_are_finite_and_all_different_shares(dtype: torch.dtype) -> None:
    seen = []
    for number in range(len(SELF_TEST_PLANS)):
        for _, _, share in known_update(number, dtype).parts():
            assert bool(torch.isfinite(share).all())
            # Every value of fp32 has bits of its own, nearly every one of 16 bits.
            words = share.view(torch.int32 if share.element_size() == 4 else torch.int16)
            assert len(words.unique()) >= 0.9 * share.numel()
            seen.append(bytes(words.flatten().numpy().tobytes()[:64]))
    assert len(set(seen)) == len(seen)


def test_an_update_is_known_by_all_of_its_bits() -> None:
    for number in range(len(SELF_TEST_PLANS)):
        assert has_known_values(known_update(number), number)
        assert not has_known_values(known_update(number), number + 1)
    assert not has_known_values(known_update(0), -1)


def swapped(update: StateUpdate) -> None:
    update.tensors["k"], update.tensors["v"] = update.tensors["v"], update.tensors["k"]  # type: ignore[index]


def other_layers(update: StateUpdate) -> None:
    shares: Any = update.tensors["ssm"]
    shares.reverse()


def cut_off(update: StateUpdate) -> None:
    update.tensors["ssm"][1].view(-1)[-1:] = 0.0


def moved(update: StateUpdate) -> None:
    shares: Any = update.tensors["conv"]
    shares[0] = shares[0].roll(1, dims=-1)


def one_bit(update: StateUpdate) -> None:
    update.tensors["k"][0].view(torch.uint8).view(-1)[17] ^= 1


@pytest.mark.parametrize("fault", [swapped, other_layers, cut_off, moved, one_bit])
def test_faults_of_bytes_show(fault: Any) -> None:
    update = known_update(0)
    fault(update)
    assert not has_known_values(update, 0)


async def test_a_link_that_works_passes_and_leaves_nothing(channel: Channel) -> None:
    channel.open("a")
    link = channel.link("a")
    await link.self_test()
    assert channel.receiver is not None
    assert channel.receiver.num_rows == 1
    assert channel.recorder.updates == []
    assert num_unfinished() == 0
    assert (link.transfers.updates, link.transfers.num_bytes) == (0, 0)
    assert not link._next_index.keys() - {"a"}
    await send(link, "a", SNAPSHOT)
    assert channel.recorder.positions == {"a": 4}


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("corrupt", r"known update 0 \(snapshot\) arrived with other bytes"),
        ("hang", r"no receipt within 1 s|UNAVAILABLE: .*[Tt]imed out"),
        ("absent", "no process group"),
    ],
)
async def test_a_group_with_a_fault_fails(group: Channel, fault: Any, said: str) -> None:
    link = faulty(group, fault)
    with pytest.raises(UnavailableError, match=said):
        await link.self_test()
    await link.close()
    # The receiver goes on, with the same pair's next link over gRPC.
    spec = LinkSpec(group.address, TOKEN, 2, "grpc")
    plain = GrpcStateLink(spec, CONFIG, DTYPE, WEIGHTS, receipt_timeout_s=10.0)
    group._links.append(plain)
    group.open("a")
    plain.open("a")
    await send(plain, "a", SNAPSHOT)
    assert group.recorder.positions == {"a": 4}
    assert [float(each["dt_bias"].sum()) for each in group.recorder.weights][-1] == 8.0
    assert num_unfinished() == 0


async def test_a_peer_that_never_joins_is_given_up(
    group: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch raises where the members do not meet, and not a fault made for tests."""
    join = process_group.join

    async def elsewhere(*args: Any) -> Any:
        return await join(*args[:2], 1, *args[3:])

    monkeypatch.setattr(process_group, "join", elsewhere)
    link = faulty(group, None)
    with pytest.raises(UnavailableError, match="the state link is broken"):
        await link.self_test()


async def test_the_test_as_a_whole_is_bounded(group: Channel) -> None:
    link = faulty(group, "hang")
    with pytest.raises(UnavailableError, match=r"known updates took more than 0\.2 s"):
        await link.self_test(timeout_s=0.2)
