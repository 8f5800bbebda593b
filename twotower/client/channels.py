"""Options of a client's channel: how soon it connects again, answers of any length, and no proxy on
this machine."""

from __future__ import annotations

import ipaddress
from urllib.parse import unquote

# By default a channel tries again after 1 s, then ever later, up to 2 minutes: resumes would wait.
_RECONNECT = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
)
# By default a client takes 4 MiB, and the score of a long text has more.
_ANSWERS = (("grpc.max_receive_message_length", -1),)
_NO_PROXY = ("grpc.enable_http_proxy", 0)
_SCHEMES = ("dns", "ipv4", "ipv6")


def channel_options(target: str) -> tuple[tuple[str, int], ...]:
    """Options of a channel to `target`, in any of gRPC's forms.

    gRPC takes a proxy from grpc_proxy, https_proxy or http_proxy, except for hosts in
    no_grpc_proxy or no_proxy. A service on this machine is called without a proxy, which would look
    for it on the proxy's machine.
    """
    options = (*_RECONNECT, *_ANSWERS)
    return (*options, _NO_PROXY) if is_loopback(target) else options


def is_loopback(target: str) -> bool:
    """True if all addresses of a target lead to this machine."""
    scheme, colon, rest = target.partition(":")
    if colon and scheme.lower() in _SCHEMES:
        # The name comes after the server to ask: dns://SERVER/NAME.
        target = rest[2:].partition("/")[2] if rest.startswith("//") else rest
    return all(_is_loopback(_host(address)) for address in unquote(target).split(","))


def _host(address: str) -> str:
    if address.startswith("["):
        return address[1:].partition("]")[0]
    # More than one colon is an IPv6 address without a port.
    return address.partition(":")[0] if address.count(":") == 1 else address


def _is_loopback(host: str) -> bool:
    name = host.rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None) or address
    # The address of none in particular leads to this machine, too.
    return bool(mapped.is_loopback or mapped.is_unspecified)
