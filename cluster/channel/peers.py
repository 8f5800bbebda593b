"""What the streams between a pair's processes share: how they listen, connect and show a secret."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio

from twotower.cluster.channel.tls import TARGET_NAME, Identity, channel_credentials

Options = Sequence[tuple[str, Any]]


def add_port(server: grpc.aio.Server, host: str, identity: Identity | None) -> str:
    """Gives a server a free port of `host`, over TLS with an `identity`; returns `host:port`."""
    host = f"[{host}]" if ":" in host else host
    if identity is None:
        port = server.add_insecure_port(f"{host}:0")
    else:
        port = server.add_secure_port(f"{host}:0", identity.server_credentials())
    return f"{host}:{port}"


def channel_to(address: str, certificate: bytes | None, options: Options) -> grpc.aio.Channel:
    """A channel to `host:port`; with a certificate (PEM) over TLS, and to its owner alone."""
    if certificate is None:
        return grpc.aio.insecure_channel(address, options=options)
    credentials = channel_credentials(certificate)
    return grpc.aio.secure_channel(address, credentials, options=[*options, *TARGET_NAME])


def shows(metadata: dict[str, Any], key: str, secret: bytes) -> bool:
    """True if a call's metadata have the secret under `key`."""
    given = metadata.get(key, "")
    return hmac.compare_digest(given if isinstance(given, bytes) else given.encode(), secret)


def retrieve(task: asyncio.Task[Any]) -> None:
    """Marks the failure of a task as seen: those who waited for it may have been cancelled."""
    if not task.cancelled():
        task.exception()
