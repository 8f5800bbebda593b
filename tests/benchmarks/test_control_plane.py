"""The tables of a control plane's figures, and its towers behind a pair, without Ray."""

from __future__ import annotations

import pytest

from benchmarks.control_plane import (
    FLOOR_HOPS,
    HOPS,
    Bare,
    Measured,
    floor_row,
    request_of,
    service_row,
    show,
)
from benchmarks.fixed_towers import StartFixed
from benchmarks.stream_load import LoadFigures
from twotower.cluster.services.tower_services import PairServices
from twotower.cluster.topology import PairTopology
from twotower.deployments.pair.tower_pair import Job, TowerPair
from twotower.protos.v1 import generation_pb2 as pb
from twotower.towers.decoding.services import Block
from twotower.towers.engine.options import EngineOptions
from twotower.towers.request.modes import Mode
from twotower.towers.request.params import GenerationParams

LOAD = LoadFigures(400, 100.0, (5.0, 9.0), None, (1.0, 2.0), 0.5)
SERVED = Measured(
    8,
    True,
    LOAD,
    {"proxy": 0.5, "router": 1.0, "pair": 1.5, "towers": 0.75, "client": 0.25},
    {"router": 40.0},
    (),
)
BARE = Measured(8, True, LOAD, {"proxy": 0.5, "floor": 0.25, "client": 0.2}, {}, ())


def test_the_three_hops_and_the_share_of_the_floor() -> None:
    assert SERVED.hops(HOPS) == 3.0
    assert BARE.hops(FLOOR_HOPS) == 0.75
    row = floor_row(BARE, SERVED)
    assert row[3:5] == [0.75, 0.25]


def test_every_row_has_a_cell_for_each_column() -> None:
    lines = [line for line in show([SERVED], [BARE]).splitlines() if line.startswith("|")]
    cells = [line.count("|") for line in lines]
    assert cells[0] == cells[1] == cells[2] == len(service_row(SERVED)) + 2
    assert cells[3] == cells[4] == cells[5] == len(floor_row(BARE, SERVED)) + 2


def test_a_burst_that_did_not_begin_has_no_time() -> None:
    late = Measured(8, False, LOAD, {"client": 0.1}, {}, ())
    assert "not all began" in service_row(late)


async def test_the_floor_sends_the_messages_that_it_was_given() -> None:
    messages = [pb.GenerateResponse(choice=number) for number in (3, 1, 2)]
    bare = Bare([message.SerializeToString() for message in messages], 0.0)
    assert [m async for m in bare.Generate(pb.GenerateRequest())] == messages


@pytest.mark.parametrize("first", ["context", "denoiser"])
async def test_a_pair_of_fixed_towers_gives_every_block_and_frees_its_row(first: str) -> None:
    topology = PairTopology("none", "cpu", "float32", EngineOptions(), 0.1, 0.0, 1)

    async def start() -> PairServices:
        return await StartFixed("pair", 0.0)(topology)

    mode: Mode = "mask_diffusion"
    params = GenerationParams(max_tokens=64, seed=1, mode=mode, first_token=first)  # type: ignore[arg-type]
    pair = TowerPair(start)
    job = Job("row", (5, 6, 7), (), params)
    blocks = [block async for block in pair.generate(job) if isinstance(block, Block)]
    assert [(block.start, len(block.token_ids)) for block in blocks] == [
        (3 + 16 * number, 16) for number in range(4)
    ]
    assert [block.finish_reason for block in blocks] == [None, None, None, "length"]
    stats = await pair.stats()
    assert [stats[tower]["rows"] for tower in ("context", "denoiser")] == [0, 0]
    assert stats["denoiser"]["passes"] == 4


def test_a_request_asks_for_whole_blocks() -> None:
    request = pb.GenerateRequest.FromString(request_of(3))
    assert request.sampling_params.max_tokens == 3 * request.sampling_params.block_size
    assert request.sampling_params.ignore_eos
