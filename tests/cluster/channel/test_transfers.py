"""What a link has carried, as its sender counts it."""

from __future__ import annotations

import pytest

from tests.support.channel import Channel, Recorder, send, shares_of
from twotower.cluster.channel.transfers import Transfers
from twotower.towers.errors import UnavailableError
from twotower.towers.state.update import UpdatePlan

SMALL, NEXT = UpdatePlan("snapshot", 0, 4), UpdatePlan("delta", 4, 8)


async def test_updates_that_were_taken_and_their_bytes() -> None:
    channel = Channel("grpc", Recorder())
    await channel.start()
    try:
        channel.open("a", "b")
        link = channel.link("a", "b")
        assert link.transfers == Transfers()
        await send(link, "a", SMALL)
        await send(link, "a", NEXT)
        sizes = [sum(share.nbytes for _, _, share in shares_of(plan, 0)) for plan in (SMALL, NEXT)]
        assert (link.transfers.updates, link.transfers.num_bytes) == (2, sum(sizes))
        assert 0 < link.transfers.nanoseconds < 30e9
        # One that does not follow on what the receiver has is refused.
        with pytest.raises(UnavailableError, match="refused"):
            await send(link, "b", NEXT)
        assert link.transfers.updates == 2
    finally:
        await channel.close()
