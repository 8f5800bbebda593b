"""A channel whose calls carry an API key."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from twotower.towers.errors import InvalidRequestError

_AUTHORIZATION = "authorization"


class _Hidden:
    """Stands in an error's text for a key."""

    def __repr__(self) -> str:
        return "another text"


class KeyedChannel:
    """A gRPC channel, blocking or of grpc.aio, that sends `authorization: Bearer KEY` with every
    call; `api_key` has passed `checked_key`.

    Not an interceptor: those of grpc.aio put a call of their own around each call, which behaves
    otherwise when it is cancelled.
    """

    def __init__(self, channel: Any, api_key: str) -> None:
        self._channel = channel
        self._metadata = ((_AUTHORIZATION, f"Bearer {api_key}"),)

    def unary_unary(self, *method: Any, **how: Any) -> Callable[..., Any]:
        """As of the channel."""
        return self._keyed(self._channel.unary_unary(*method, **how))

    def unary_stream(self, *method: Any, **how: Any) -> Callable[..., Any]:
        """As of the channel."""
        return self._keyed(self._channel.unary_stream(*method, **how))

    def stream_unary(self, *method: Any, **how: Any) -> Callable[..., Any]:
        """As of the channel."""
        return self._keyed(self._channel.stream_unary(*method, **how))

    def stream_stream(self, *method: Any, **how: Any) -> Callable[..., Any]:
        """As of the channel."""
        return self._keyed(self._channel.stream_stream(*method, **how))

    def close(self, *grace: Any) -> Any:
        """As of the channel; to be awaited for one of grpc.aio."""
        return self._channel.close(*grace)

    def _keyed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def with_key(
            request: Any, *, metadata: Sequence[tuple[str, Any]] | None = None, **how: Any
        ) -> Any:
            return call(request, metadata=(*(metadata or ()), *self._metadata), **how)

        return with_key


def authorization(api_key: object) -> dict[str, str]:
    """The header of HTTP that carries an API key. Raises as `checked_key`."""
    return {_AUTHORIZATION: f"Bearer {checked_key(api_key)}"}


def checked_key(api_key: object) -> str:
    """An API key that a header can hold. Raises InvalidRequestError without repeating it."""
    if isinstance(api_key, str) and api_key and all("!" <= letter <= "~" for letter in api_key):
        return api_key
    raise InvalidRequestError("api_key", _Hidden(), "visible ASCII characters without spaces")
