"""The services that requests go to, and which of them is asked next."""

from __future__ import annotations

import random
from collections.abc import Sequence
from urllib.parse import urlsplit

from twotower.protos.backoff import backoff_s
from twotower.towers.errors import InvalidRequestError

# Of a service that names a longer wait than is sensible.
LONGEST_REST_S = 60.0
_FORM = "http://HOST:PORT, https://HOST[:PORT] or HOST:PORT"


class Target:
    """A service's HTTP front, with what is known of it. Times are those of an event loop."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.in_flight = 0
        self.rests_until = 0.0
        self._failures = 0

    def answered(self) -> None:
        """It works."""
        self._failures = 0

    def rest(self, now: float, seconds: float | None) -> None:
        """Leaves it out for as long as it asked for, or ever longer after each failure in a row:
        0.1 to 5 s. Callers that it sent away together do not come back together."""
        if seconds is None and now < self.rests_until:
            # One of those that were on their way already: the same failure once more.
            return
        self._failures += 1
        if seconds is None:
            seconds = backoff_s(self._failures)
        else:
            seconds = min(seconds, LONGEST_REST_S) * (1.0 + random.random() / 4.0)
        self.rests_until = max(self.rests_until, now + seconds)


class Targets:
    """One or several services of the same model. Raises InvalidRequestError for a bad address."""

    def __init__(self, targets: str | Sequence[str]) -> None:
        given = [targets] if isinstance(targets, str) else list(targets)
        if not given:
            raise InvalidRequestError("target", given, "at least one address")
        self._targets = [Target(url) for url in dict.fromkeys(map(target_url, given))]

    def best(self, now: float) -> Target:
        """The one that is asked next: of those that do not rest the one with the fewest requests of
        ours, or the one that rests for the shortest time."""
        awake = [target for target in self._targets if target.rests_until <= now]
        if awake:
            return min(awake, key=lambda target: target.in_flight)
        return min(self._targets, key=lambda target: target.rests_until)


def target_url(target: str) -> str:
    """The URL that a service's paths are put behind. Raises InvalidRequestError.

    The `/v1` of an OpenAI client's base URL may be there.
    """
    text = target.strip() if isinstance(target, str) else ""
    url = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise InvalidRequestError("target", target, _FORM) from None
    bare = "://" not in text and port is None
    if parts.scheme not in ("http", "https") or not parts.hostname or bare or " " in text:
        raise InvalidRequestError("target", target, _FORM)
    if parts.query or parts.fragment or parts.username is not None:
        raise InvalidRequestError("target", parts.hostname, f"{_FORM}, and nothing else")
    path = parts.path.rstrip("/").removesuffix("/v1")
    return f"{parts.scheme}://{parts.netloc}{path}"
