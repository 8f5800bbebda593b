"""The state channel over TLS: who is refused, and what can be read on the way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cryptography import x509

from tests.support.channel import (
    CONFIG,
    DTYPE,
    TOKEN,
    WEIGHTS,
    Channel,
    Recorder,
    assert_holds,
    send,
    shares_of,
)
from twotower.cluster.channel.grpc import TOKEN_KEY, GrpcStateLink, LinkSpec
from twotower.cluster.channel.tls import SERVER_NAME, new_identity
from twotower.towers.errors import UnavailableError
from twotower.towers.state.update import UpdatePlan

PLAN = UpdatePlan("snapshot", 0, 4)


@asynccontextmanager
async def opened(transport: str) -> AsyncIterator[Channel]:
    channel = Channel(transport, Recorder())
    await channel.start()
    channel.open("a")
    try:
        yield channel
    finally:
        await channel.close()


async def sent(address: str, certificate: bytes | None) -> None:
    """One update over a link of its own, with the right token."""
    spec = LinkSpec(address, TOKEN, 1, certificate=certificate)
    link = GrpcStateLink(spec, CONFIG, DTYPE, WEIGHTS, receipt_timeout_s=5)
    link.open("a")
    try:
        await send(link, "a", PLAN)
    finally:
        await link.close()


@pytest.mark.parametrize(
    ("transport", "certificate"),
    [
        ("grpc_tls", new_identity().certificate),
        ("grpc_tls", None),
        ("grpc", new_identity().certificate),
    ],
    ids=["another certificate", "plain text to TLS", "TLS to plain text"],
)
async def test_a_sender_that_expects_another_receiver_sends_nothing(
    transport: str, certificate: bytes | None
) -> None:
    async with opened(transport) as channel:
        with pytest.raises(UnavailableError, match="broken"):
            await sent(channel.address, certificate)
        assert channel.recorder.updates == []
        assert channel.recorder.weights == []
        # The receiver serves its own sender all the same.
        await sent(channel.address, channel.certificate)
        assert channel.recorder.positions == {"a": 4}


async def test_a_receiver_that_is_replaced_in_its_place_is_another() -> None:
    async with opened("grpc_tls") as first, opened("grpc_tls") as second:
        with pytest.raises(UnavailableError, match="broken"):
            await sent(second.address, first.certificate)


async def test_a_plain_text_client_learns_nothing() -> None:
    async with opened("grpc_tls") as channel:
        host, _, port = channel.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        # HTTP/2's preface and empty settings, which a server answers with its own.
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
        got = await asyncio.wait_for(reader.read(1 << 16), 5)
        writer.close()
        # Nothing, or an alert of TLS (record type 21).
        assert got == b"" or got[0] == 21


class Tap:
    """Passes bytes on to a receiver and keeps a copy of both directions."""

    def __init__(self, address: str) -> None:
        self._host, _, self._port = address.rpartition(":")
        self.seen = bytearray()

    async def _copy(self, source: Any, target: Any) -> None:
        while data := await source.read(1 << 16):
            self.seen += data
            target.write(data)

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        """For one connection."""
        taken: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        server = await asyncio.start_server(lambda *ends: taken.set_result(ends), "127.0.0.1", 0)
        async with server, asyncio.TaskGroup() as group:
            passing = group.create_task(self._pass(taken))
            yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
            passing.cancel()

    async def _pass(self, taken: Any) -> None:
        reader, writer = await taken
        back, onwards = await asyncio.open_connection(self._host, int(self._port))
        try:
            await asyncio.gather(self._copy(reader, onwards), self._copy(back, writer))
        finally:
            for end in (onwards, writer):
                end.close()
                await end.wait_closed()


@pytest.mark.parametrize("transport", ["grpc", "grpc_tls"])
async def test_what_can_be_read_on_the_way(transport: str) -> None:
    """Without TLS token and states, which shows that the tap hears; with it neither."""
    async with opened(transport) as channel:
        tap = Tap(channel.address)
        async with tap.listening() as address:
            await sent(address, channel.certificate)
        shares = shares_of(PLAN, 0)
        assert_holds(channel.recorder.updates[0][1], shares)
    state = next(share for name, _, share in shares if name == "ssm").contiguous()
    secrets = (TOKEN_KEY.encode(), TOKEN.encode(), bytes(state.view(torch.uint8).numpy())[:64])
    readable = [secret in tap.seen for secret in secrets]
    assert len(tap.seen) > 1000
    # HTTP/2 may have packed the letters of name and token.
    assert readable[2] is (transport == "grpc")
    assert transport == "grpc" or not any(readable)


def test_an_identity() -> None:
    one, other = new_identity(), new_identity()
    assert one.certificate != other.certificate
    assert "PRIVATE" not in repr(one)
    assert b"PRIVATE" not in one.certificate
    read = x509.load_pem_x509_certificate(one.certificate)
    names = read.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [SERVER_NAME]
    days = (read.not_valid_after_utc - datetime.now(UTC)).days
    assert days > 3000
    assert (datetime.now(UTC) - read.not_valid_before_utc).days >= 1


def test_secrets_are_not_in_the_repr_of_a_link() -> None:
    spec = LinkSpec("host:1", TOKEN, 1, certificate=b"PEM")
    assert TOKEN not in repr(SimpleNamespace(spec=spec))
    assert "PEM" not in repr(spec)
