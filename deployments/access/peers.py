"""The other end of a connection, as gRPC or an HTTP server names it."""

from __future__ import annotations

import ipaddress
from urllib.parse import unquote

_MOST_CHARACTERS = 256


def is_loopback_peer(peer: str | None) -> bool:
    """True if a peer is surely on this machine.

    Takes gRPC's forms (`ipv4:127.0.0.1:51234`, `ipv6:%5B::1%5D:1`, `unix:...`) and an address as
    HTTP servers have it, with or without a port. Names are not looked up: they are elsewhere.
    """
    if not peer or len(peer) > _MOST_CHARACTERS:
        return False
    scheme, _, rest = peer.partition(":")
    if scheme in ("unix", "unix-abstract"):
        return True
    parsed = _parsed(unquote(rest) if scheme in ("ipv4", "ipv6") else peer)
    # A socket for both families shows an IPv4 peer as ::ffff:127.0.0.1.
    return parsed is not None and (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback


def is_address(host: str) -> bool:
    """True if a host, with or without a port, is an IP address and not a name."""
    return len(host) <= _MOST_CHARACTERS and _parsed(host) is not None


def _parsed(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(_host(address))
    except ValueError:
        return None


def _host(address: str) -> str:
    """The host of `HOST`, `HOST:PORT` or `[HOST]:PORT`, without a zone."""
    if address.startswith("["):
        host = address[1:].partition("]")[0]
    else:
        # More than one colon is an IPv6 address without a port.
        host = address.partition(":")[0] if address.count(":") == 1 else address
    return host.partition("%")[0]
