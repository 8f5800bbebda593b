"""What the tests of the cluster share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest


@pytest.fixture(autouse=True)
async def bounded() -> AsyncIterator[None]:
    """No test here waits for ever."""
    loop, test = asyncio.get_running_loop(), asyncio.current_task()
    assert test is not None
    timer = loop.call_later(60, test.cancel)
    yield
    timer.cancel()
