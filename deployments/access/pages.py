"""Requests that a page in somebody's browser sends without their wish.

A browser adds no API key by itself, so a request with a key is wanted. A service without keys is
open to whatever runs on its machine, and a browser is made to call it by any page that it shows: by
a form (the answer is kept from that page, but the work is done), or by a page whose name has been
turned to a loopback address, which may read the answers as well.
"""

from __future__ import annotations

from collections.abc import Sequence

from twotower.deployments.access.access import Caller
from twotower.deployments.access.errors import ForbiddenError
from twotower.deployments.access.peers import is_address


def check_page(
    caller: Caller, origin: str | None, host: str | None, allowed: Sequence[str] = ()
) -> None:
    """Refuses anonymous HTTP requests of other sites' pages. Raises ForbiddenError.

    `origin` and `host` are the headers' values, None without one; `allowed` are cors_origins.
    """
    if not caller.anonymous:
        return
    # Browsers name the page with every request of another origin that is more than a look.
    if origin is not None and origin not in allowed and _place(origin) != (host or "").lower():
        raise ForbiddenError("origin: got another site's page, expected one of cors_origins")
    if caller.admin and host is not None and not _leads_here(host):
        raise ForbiddenError("host: got a name, expected localhost or an address; or use a key")


def _place(origin: str) -> str:
    """Host and port of an origin such as `https://host:port`."""
    return origin.partition("://")[2].lower()


def _leads_here(host: str) -> bool:
    """True for names that nobody else can turn to this machine."""
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    name = name.rstrip(".").lower()
    return name == "localhost" or name.endswith(".localhost") or is_address(host)
