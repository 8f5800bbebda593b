"""API keys: what an operator keeps of them, and how a presented one is found.

A key is 256 random bits, so nobody finds one by trying, and its plain SHA-256 is safe to keep:
salts and slow hashes protect what people choose themselves. Keys come from `new_key` alone.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

PREFIX = "tt-"
_KEY_BYTES = 32
_MOST = 2**31 - 1
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-fA-F]{64}$", to_lower=True)]


class ApiKey(BaseModel):
    """A key as a service keeps it: its hash, what its owner is called, and what they may use."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(
        pattern=r"^[!-~]{1,64}$",
        description="what the key's owner is called in logs and metrics: 1 to 64 ASCII characters "
        "without spaces",
    )
    sha256: Digest = Field(
        repr=False, description="SHA-256 of the key in hex, as `twotower key new` prints it"
    )
    max_concurrent: int | None = Field(
        None, ge=1, le=_MOST, description="requests at a time; none = no limit"
    )
    tokens_per_minute: int | None = Field(
        None, ge=1, le=_MOST, description="tokens of prompts and outputs; none = no limit"
    )
    admin: bool = Field(False, description="may use the admin routes as well")


def new_key() -> tuple[str, str]:
    """A new key, and its SHA-256 in hex. The key itself is to be kept by its owner alone."""
    plain = PREFIX + secrets.token_urlsafe(_KEY_BYTES)
    return plain, _sha256(plain).hex()


def check_distinct(keys: Iterable[ApiKey]) -> None:
    """Raises ValueError if two keys have one name or one hash; the hash is not repeated."""
    given = list(keys)
    for name, count in Counter(key.name for key in given).items():
        if count > 1:
            raise ValueError(f"name: got {name!r} {count} times, expected another for each key")
    first: dict[str, str] = {}
    for key in given:
        other = first.setdefault(key.sha256, key.name)
        if other != key.name:
            raise ValueError(f"sha256: got one for {other!r} and {key.name!r}, expected two")


class Keyring:
    """The keys of a service. Raises ValueError for two that have one name or hash."""

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        check_distinct(keys)
        self._entries = [(bytes.fromhex(key.sha256), key) for key in keys]

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, presented: str) -> ApiKey | None:
        """The key that a caller presents, of any length and characters; None for an unknown one.

        Every entry is compared, each in constant time: how long it takes tells nothing.
        """
        digest = _sha256(presented)
        found: ApiKey | None = None
        for known, key in self._entries:
            if hmac.compare_digest(known, digest):
                found = key
        return found


def _sha256(text: str) -> bytes:
    # Surrogates are what a header's undecodable bytes become; no key has any.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
