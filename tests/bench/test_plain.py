"""The plain PyTorch that we are compared with computes the same."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch

from tests.bench.conftest import CPU
from twotower.bench import plain
from twotower.bench.filled import FilledPool, pages_of_rows
from twotower.bench.probes import Probe, measured_unique
from twotower.bench.random_towers import TowerMaker
from twotower.planner.floors import PassKind, shape_of
from twotower.planner.shapes import TINY
from twotower.towers.model.backbone import Tower
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.model.denoiser_tower import DenoiserTower

KINDS: tuple[PassKind, ...] = ("denoise", "ar", "extend")


def error(out: torch.Tensor, reference: torch.Tensor) -> float:
    return float((out - reference).norm() / reference.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_pass_is_ours(
    kind: PassKind, context_tower: ContextTower, denoiser_tower: DenoiserTower, pool: FilledPool
) -> None:
    tower: Tower = denoiser_tower if kind == "denoise" else context_tower
    with pool.rows_at(150, 3, 64) as states:
        probe = Probe.of(kind, tower, states, 16)
        own = probe.plain()
        reference = own.hidden(probe.tokens, probe.modulation())
        hidden = probe.run()
        expected = reference.flatten(0, 1) if kind == "denoise" else reference[:, -1]
        assert error(hidden, expected) < 1e-5


def test_a_plain_context_pass_moves_its_states_as_ours(
    context_tower: ContextTower, pool: FilledPool
) -> None:
    with pool.rows_at(150, 3, 64) as states:
        probe = Probe.of("extend", context_tower, states, 16)
        own = plain.copy_states(states, TINY, 16)
        plain.PlainPass(context_tower, own).hidden(probe.tokens)
        probe.run()
        for layer, ssm in enumerate(own.ssm):
            moved = torch.stack([state.ssm[layer] for state in states])
            assert error(ssm, moved) < 1e-5
            moved = torch.stack([state.conv[layer] for state in states])
            assert error(own.conv[layer], moved) < 1e-5
        for layer, k in enumerate(own.k):
            held = [state.kv(layer, 0, 166) for state in states]
            assert error(k, torch.stack([each for each, _ in held])) < 1e-5
            assert error(own.v[layer], torch.stack([each for _, each in held])) < 1e-5


def test_a_plain_denoiser_leaves_its_states(
    denoiser_tower: DenoiserTower, pool: FilledPool
) -> None:
    with pool.rows_at(150, 2, 16) as states:
        probe = Probe.of("denoise", denoiser_tower, states, 16)
        own = plain.copy_states(states, TINY, 16)
        before = [each.clone() for each in (*own.ssm, *own.conv)]
        plain.PlainPass(denoiser_tower, own).hidden(probe.tokens, probe.modulation())
        assert all(map(torch.equal, before, (*own.ssm, *own.conv)))


def test_predicted_tokens_are_those_of_our_logits(
    denoiser_tower: DenoiserTower, pool: FilledPool
) -> None:
    with pool.rows_at(150, 2, 16) as states:
        probe = Probe.of("denoise", denoiser_tower, states, 16)
        wanted = probe.wanted()
        # 0.6 of 16 positions are masked, in each of two rows.
        assert len(wanted) == 20
        tokens = probe.plain().predict(probe.tokens, probe.modulation(), wanted)
        assert torch.equal(tokens, denoiser_tower.logits(probe.run())[wanted].argmax(-1))


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_layer_compiles_whole_and_once(
    kind: PassKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def run_as_traced(graph: torch.fx.GraphModule, _inputs: Sequence[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = partial(torch.compile, backend=run_as_traced, fullgraph=True)
    monkeypatch.setattr(plain.torch, "compile", compiled)
    maker = TowerMaker(TINY, CPU, torch.bfloat16, torch.Generator().manual_seed(2))
    tower: Tower = maker.denoiser() if kind == "denoise" else maker.context()
    pool = FilledPool(TINY, 2, pages_of_rows(2, 256), CPU, torch.bfloat16)
    torch.compiler.reset()
    with pool.rows_at(100, 2, 32) as states:
        probe = Probe.of(kind, tower, states, 16)
        eager = probe.plain().hidden(probe.tokens, probe.modulation())
        traced = probe.plain(compiled=True).hidden(probe.tokens, probe.modulation())
    assert torch.equal(eager, traced)
    assert len(graphs) == len(set(TINY.layer_pattern))


def test_unique_experts_are_those_that_our_router_chooses(
    context_tower: ContextTower, pool: FilledPool
) -> None:
    """A token alone reads as many as it may choose, many tokens nearly all."""
    one = measured_unique("ar", context_tower, pool, 1, 16)
    assert one == TINY.num_experts_per_tok
    many = measured_unique("extend", context_tower, pool, 16, 16)
    assert one < many <= TINY.n_routed_experts
    assert many > TINY.n_routed_experts - 3


def test_a_pass_has_the_head_that_its_kind_needs() -> None:
    heads = {
        kind: shape_of(kind, TINY, 4, 100, 16, masked=0.5).head_tokens
        for kind in (*KINDS, "verify")
    }
    assert heads == {"denoise": 32, "ar": 4, "extend": 0, "verify": 64}
