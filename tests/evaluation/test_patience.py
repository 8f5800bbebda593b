"""Calls of a full service are made again for as long as it says when to come back."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from twotower.client import ServiceError
from twotower.evaluation.over_grpc import patiently
from twotower.protos.refusals import with_retry_after

FULL = grpc.StatusCode.RESOURCE_EXHAUSTED


class Service:
    """Refuses the first calls with a text."""

    def __init__(self, refusals: int, details: str) -> None:
        self.calls = 0
        self._refusals = refusals
        self._details = details

    async def __call__(self) -> int:
        self.calls += 1
        if self.calls <= self._refusals:
            raise ServiceError(FULL, self._details)
        return self.calls


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were waited for, in no time."""
    found: list[float] = []

    async def sleep(seconds: float) -> None:
        found.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    return found


async def test_a_full_service_is_asked_again(waits: list[float]) -> None:
    assert await patiently(Service(3, with_retry_after("full", 2.0))) == 4
    assert len(waits) == 3
    assert min(waits) >= 2.0


async def test_a_refusal_for_good_is_not(waits: list[float]) -> None:
    service = Service(1, "the row can never fit")
    with pytest.raises(ServiceError, match="never fit"):
        await patiently(service)
    assert (service.calls, waits) == (1, [])


async def test_patience_ends(waits: list[float]) -> None:
    service = Service(5, with_retry_after("full", 2.0))
    with pytest.raises(ServiceError, match="full"):
        await patiently(service, patience_s=-1.0)
    assert (service.calls, waits) == (1, [])
