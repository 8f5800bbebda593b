"""Who calls: from an `authorization` header and a peer's address to a caller, or a refusal."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from twotower.deployments.access.errors import ForbiddenError, UnauthenticatedError
from twotower.deployments.access.keys import ApiKey, Keyring
from twotower.deployments.access.limits import KeyLimits
from twotower.deployments.access.peers import is_loopback_peer

ANONYMOUS = "anonymous"
_EXPECTED = "expected 'Bearer KEY'"


@dataclass(frozen=True)
class Caller:
    """Who has sent a request: a name for logs and metrics, rights, and limits that all requests of
    this caller share. `anonymous` callers have shown no key."""

    name: str
    admin: bool
    limits: KeyLimits
    anonymous: bool = False

    def check_admin(self) -> None:
        """Raises ForbiddenError unless the caller may use admin routes."""
        if not self.admin:
            raise ForbiddenError(f"this is for admins, and {self.name!r} is none")


class Access:
    """Decides who may call a service.

    With keys every request needs one. Without keys requests of this machine are let in, as admins,
    and those of other machines only if `allow_anonymous`, and never as admins.

    Limits are counted in this process. `share` is the number of routers: each lets a caller have
    its part of a key's limits (rounded down, at least 1). So a caller whose requests all reach one
    router gets that part and no more, and a limit below the number of routers is exceeded.
    """

    def __init__(
        self,
        keys: Sequence[ApiKey] = (),
        allow_anonymous: bool = False,
        *,
        share: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keyring = Keyring(keys)
        self._allow_anonymous = allow_anonymous
        self._callers = {key.name: _caller(key, share, clock) for key in keys}
        free = KeyLimits(ANONYMOUS)
        self._here = Caller(ANONYMOUS, True, free, anonymous=True)
        self._elsewhere = Caller(ANONYMOUS, False, free, anonymous=True)

    def caller(
        self, authorization: str | None, peer: str | None, *, forwarded: bool = False
    ) -> Caller:
        """The caller of a request. Raises UnauthenticatedError.

        `authorization` is the value of the header or metadata of that name, None without one.
        `peer` is where the request comes from, as gRPC or an HTTP server says it; None or anything
        unknown counts as elsewhere. So does a request that a front has `forwarded` (it has an
        x-forwarded-for header): the peer is then the front's machine and not the caller's.
        """
        if len(self._keyring):
            return self._by_key(authorization)
        if not forwarded and is_loopback_peer(peer):
            return self._here
        if self._allow_anonymous:
            return self._elsewhere
        raise UnauthenticatedError(
            "the service has no API keys and answers its own machine only; its operator can set "
            "api_keys or allow_anonymous"
        )

    def _by_key(self, authorization: str | None) -> Caller:
        if authorization is None:
            raise UnauthenticatedError(f"authorization: got none, {_EXPECTED}")
        key = self._keyring.find(_bearer(authorization))
        if key is None:
            raise UnauthenticatedError("authorization: got an unknown key")
        return self._callers[key.name]


def _bearer(authorization: str) -> str:
    """The key in `Bearer KEY`. Raises UnauthenticatedError for anything else."""
    scheme, _, key = authorization.strip(" \t").partition(" ")
    if scheme.lower() != "bearer" or not key.strip(" "):
        raise UnauthenticatedError(f"authorization: got something else, {_EXPECTED}")
    return key.strip(" ")


def _caller(key: ApiKey, share: int, clock: Callable[[], float]) -> Caller:
    limits = (_part(key.max_concurrent, share), _part(key.tokens_per_minute, share))
    return Caller(key.name, key.admin, KeyLimits(key.name, *limits, clock))


def _part(limit: int | None, share: int) -> int | None:
    return None if limit is None else max(1, limit // share)
