"""A pair whose transport fails its self-test is ready over gRPC, with the same tokens.

Real towers behind the proxies of actors, in this process and without Ray.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.actors import Actor
from twotower import Request, TwoTower
from twotower.cluster.channel.grpc import GrpcStateLink
from twotower.cluster.channel.receiver import StateReceiver
from twotower.cluster.placement import start
from twotower.cluster.services import actors
from twotower.cluster.services.tower_services import PairServices
from twotower.cluster.topology import LinkFaults, PairTopology
from twotower.towers.decoding.generation import generate_blocks
from twotower.towers.engine.options import EngineOptions
from twotower.towers.request.params import GenerationParams

PROMPT = [5, 9, 4, 17, 3]
PARAMS = GenerationParams(max_tokens=32, seed=4)


@asynccontextmanager
async def pair(
    folder: Path, faults: LinkFaults | None, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[PairServices]:
    options = EngineOptions(max_num_seqs=4, max_context=128, prefix_cache_mib=0)
    topology = PairTopology(
        str(folder), "cpu", "float32", options, 0.4, 0.0, 1, transport="gloo", faults=faults
    )
    made: list[Any] = []

    def actor(kind: type, *_: Any) -> Actor:
        made.append(kind(topology))
        return Actor(made[-1])

    monkeypatch.setattr(start, "_actor", actor)
    monkeypatch.setattr(start.ray.util, "get_current_placement_group", lambda: None)
    sending, receiving = (
        partial(GrpcStateLink, receipt_timeout_s=1.0),
        partial(StateReceiver, timeout_s=1.0),
    )
    monkeypatch.setattr(actors, "GrpcStateLink", sending)
    monkeypatch.setattr(actors, "StateReceiver", receiving)
    try:
        yield await start.start_towers(topology)
    finally:
        for one in made:
            await one.close()


async def tokens_of(services: PairServices) -> list[int]:
    blocks = generate_blocks(services.context, services.denoiser, "row", PROMPT, PARAMS)
    return [token async for block in blocks for token in block.token_ids]


@pytest.mark.parametrize("fault", [None, "corrupt", "hang", "absent"])
async def test_streams_are_exact_over_what_works(
    fault: Any,
    tiny_a: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    faults = None if fault is None else LinkFaults(group=fault)
    caplog.set_level(logging.WARNING)
    async with pair(tiny_a, faults, monkeypatch) as services:
        stats = await services.context.stats()
        found = (stats.gloo_links, stats.grpc_links, stats.nccl_links)
        assert found == ((1, 0, 0) if fault is None else (0, 1, 0))
        assert stats.transfers == stats.slots_used == stats.pages_used == stats.rows == 0
        assert services.denoiser is not None
        mirrors = await services.denoiser.stats()
        assert mirrors.mirrors == mirrors.slots_used == mirrors.pages_used == mirrors.rows == 0
        got = await tokens_of(services)
        await services.denoiser.check()
    warnings = [record.getMessage() for record in caplog.records]
    if fault is None:
        assert warnings == []
    else:
        (line,) = warnings
        assert line.startswith("transport gloo does not carry states from the context tower (node ")
        assert "CPU) to denoiser tower 0 (node " in line
        assert line.endswith("; its states go over gRPC")
        assert "\n" not in line
    [want] = TwoTower.from_pretrained(tiny_a).generate_requests([Request(PROMPT, PARAMS)])
    assert got == want.token_ids
