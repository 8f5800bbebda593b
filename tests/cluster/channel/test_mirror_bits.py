"""A mirror behind the channel holds the sender's bits, whatever carries them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.support.channel import TRANSPORTS, Channel
from tests.support.random_model import small_config, write_checkpoint
from twotower.kernels.replay import ReplayWeights
from twotower.towers.checkpoint.weights import load_context_tower
from twotower.towers.config.model_config import ATTENTION
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.state.context_state import ContextState
from twotower.towers.state.update import StateUpdate, UpdatePlan

# A prompt in two passes, blocks, and a pass of which only K/V goes ahead of a snapshot.
PLANS = [
    UpdatePlan("kv", 0, 20),
    UpdatePlan("snapshot", 20, 37),
    UpdatePlan("delta", 37, 53),
    UpdatePlan("delta", 53, 69),
    UpdatePlan("delta", 69, 70),
    UpdatePlan("kv", 70, 76),
    UpdatePlan("snapshot", 76, 80),
]


class Mirror:
    """The denoiser's side: a state that only updates move."""

    def __init__(self, tower: ContextTower) -> None:
        self.tower = SimpleNamespace(device=torch.device("cpu"))
        self.state = tower.new_state(128)
        self._groups = tower.config.n_groups

    def follow(self, tensors: Mapping[str, Tensor]) -> None:
        self._weights = ReplayWeights.from_tensors(tensors, self._groups)

    def receive(self, row_id: str, update: StateUpdate) -> None:
        assert row_id == "a"
        self.state.apply(update, self._weights)


def assert_same_bits(tower: ContextTower, state: ContextState, mirror: ContextState) -> None:
    assert mirror.position == state.position
    assert torch.equal(mirror.conv.view(torch.int32), state.conv.view(torch.int32))
    assert torch.equal(mirror.ssm.view(torch.int32), state.ssm.view(torch.int32))
    for layer in range(len(tower.config.layers_of(ATTENTION))):
        pairs = zip(
            mirror.kv(layer, 0, state.position), state.kv(layer, 0, state.position), strict=True
        )
        for got, expected in pairs:
            assert torch.equal(got.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_mirror_is_bit_equal_to_the_sender(transport: str, tmp_path: Path) -> None:
    config = small_config(layer_pattern="M*EM*-M")
    tower = load_context_tower(write_checkpoint(tmp_path, config))
    mirror, state = Mirror(tower), tower.new_state(128)
    channel = Channel(transport, mirror)
    await channel.start()
    channel.open("a")
    link = channel.link("a", weights=tower.replay_tensors(), config=config)
    tokens = torch.randint(config.vocab_size, (80,), generator=torch.Generator().manual_seed(0))
    for plan in PLANS:
        writer = link.begin("a", state, plan)
        piece = tokens[plan.start : plan.position].tolist()
        passed = tower.read([piece], [state], [writer])
        tower.advance_rows(passed, [state], [plan.count], [writer])
        await writer.finish()
        if plan.kind != "kv":
            assert_same_bits(tower, state, mirror.state)
    assert state.ssm.abs().max() > 0
    await channel.close()
