"""The link of towers that share one copy of every state."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.channel import CONFIG, DTYPE
from twotower.towers.engine.local_link import LocalLink
from twotower.towers.state.update import UpdatePlan

PLAN = UpdatePlan("snapshot", 0, 4)


class Adopter:
    def __init__(self) -> None:
        self.adopted: list[tuple[str, object]] = []

    def adopt(self, row_id: str, state: object) -> None:
        self.adopted.append((row_id, state))


@pytest.fixture
def linked() -> tuple[Any, Adopter]:
    tower: Any = SimpleNamespace(config=CONFIG, dtype=DTYPE)
    adopter: Any = Adopter()
    return LocalLink(tower, adopter, shared=True), adopter


async def test_a_shared_state_is_adopted_when_the_update_is_whole(
    linked: tuple[Any, Adopter],
) -> None:
    link, adopter = linked
    state = object()
    link.open("a")
    writer = link.begin("a", state, PLAN)
    writer.put("k", 0, torch.zeros(1))
    assert adopter.adopted == []
    await writer.finish()
    await writer.finish()
    assert adopter.adopted == [("a", state)]


@pytest.mark.parametrize("given_up", ["aborted", "forgotten", "never opened"])
async def test_what_is_given_up_is_not_adopted(linked: tuple[Any, Adopter], given_up: str) -> None:
    link, adopter = linked
    if given_up != "never opened":
        link.open("a")
    writer = link.begin("a", object(), PLAN)
    if given_up == "aborted":
        writer.abort()
    elif given_up == "forgotten":
        link.forget("a")
    await writer.finish()
    assert adopter.adopted == []
