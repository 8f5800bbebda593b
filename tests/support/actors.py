"""Actors of towers as their proxies see them, in this process and without Ray."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable
from typing import Any

from ray.exceptions import RayTaskError


class Method:
    """A method of an actor as Ray calls it: with each answer something to await."""

    def __init__(self, actor: Any, name: str, kinds: list[str], death: Exception | None) -> None:
        self._method = getattr(actor, name)
        self._kinds = kinds
        self._death = death
        self._streams = False

    def options(self, *, num_returns: str) -> Method:
        assert num_returns == "streaming"
        self._streams = True
        return self

    def remote(self, *args: Any) -> Any:
        self._kinds.append("stream" if self._streams else "call")
        return self._stream(*args) if self._streams else self._method(*args)

    async def _stream(self, *args: Any) -> AsyncIterator[Awaitable[Any]]:
        async def given(value: Any) -> Any:
            if isinstance(value, Exception):
                raise value
            return value

        try:
            async for item in self._method(*args):
                yield given(item)
                if self._death is not None:
                    yield given(self._death)
                    return
        except Exception as error:
            yield given(RayTaskError("watched_block", "trace", error).as_instanceof_cause())


class Actor:
    """The handle of an actor with such methods; `kinds` are the calls that were made."""

    def __init__(self, actor: Any, death: Exception | None = None) -> None:
        self._actor = actor
        self._death = death
        self.kinds: list[str] = []

    def __getattr__(self, name: str) -> Method:
        return Method(self._actor, name, self.kinds, self._death)
