"""Several completions of a request, read as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, cast

import pytest

from twotower.deployments.completions.completions import Completion, merged


class Choice:
    """A completion that gives one item, and then waits or ends with an error."""

    def __init__(self, error: BaseException | None = None) -> None:
        self._error = error
        self.freed = False

    async def blocks(self) -> AsyncGenerator[str, None]:
        try:
            yield "item"
            if self._error is not None:
                raise self._error
            await asyncio.Event().wait()
        finally:
            self.freed = True


async def _read(choices: list[Any]) -> None:
    async with asyncio.timeout(5):
        async for choice, item in merged(cast("list[Completion]", choices)):
            assert (choice in choices, item) == (True, "item")


@pytest.mark.parametrize(
    "error", [RuntimeError("lost"), asyncio.CancelledError("by Ray")], ids=["error", "cancelled"]
)
async def test_what_ends_one_ends_all(error: BaseException) -> None:
    choices: list[Any] = [Choice(), Choice(error), Choice()]
    with pytest.raises(type(error)) as raised:
        await _read(choices)
    assert raised.value is error
    assert all(choice.freed for choice in choices)


async def test_closing_frees_all() -> None:
    choices: list[Any] = [Choice(), Choice()]
    items = merged(cast("list[Completion]", choices))
    assert await anext(items) == (choices[0], "item")
    await items.aclose()
    assert all(choice.freed for choice in choices)
