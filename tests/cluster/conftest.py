"""What the tests of the cluster share."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.channel import LIVE, WatchedAssembly

LIMIT_S = 60


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """No test here waits for ever, whichever task or loop it waits in."""

    def give_up(*_: Any) -> None:
        raise TimeoutError(f"the test took more than {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(LIMIT_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def watched_assemblies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `num_unfinished` see what receivers of this process hold."""
    LIVE.clear()
    monkeypatch.setattr("twotower.cluster.channel.receiver.Assembly", WatchedAssembly)
