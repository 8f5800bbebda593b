"""Refusals of a caller. Their texts name no key and are safe to show.

TwoTowerError
├── UnauthenticatedError     no key, or an unknown one: gRPC UNAUTHENTICATED, HTTP 401
├── ForbiddenError           a known caller asks for what only admins may: PERMISSION_DENIED, 403
└── CapacityError
    └── RateLimitError       a limit of the caller's key is reached: RESOURCE_EXHAUSTED, 429
"""

from __future__ import annotations

from twotower.towers.errors import CapacityError, TwoTowerError


class UnauthenticatedError(TwoTowerError):
    """The request has no API key where one is needed, or an unknown one."""


class ForbiddenError(TwoTowerError):
    """The caller is known, but may not do this."""


class RateLimitError(CapacityError):
    """A limit of the caller's key is reached; after `retry_after_s` seconds it may have room."""

    def __init__(self, text: str, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(text)

    def __reduce__(self) -> tuple[type[RateLimitError], tuple[str, float]]:
        return type(self), (str(self), self.retry_after_s)
