"""Engines on a CUDA device, with graphs, kernels and decisions on the device: tokens of the CPU.

The recorded models in fp32: what differs between the devices is below what decides a token.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.rows import Towers
from twotower.towers.checkpoint.weights import load_context_tower, load_denoiser_tower
from twotower.towers.decoding.generation import generate_blocks
from twotower.towers.engine.context_engine import ContextEngine
from twotower.towers.engine.denoiser_engine import DenoiserEngine
from twotower.towers.engine.local_link import LocalLink
from twotower.towers.engine.options import EngineOptions
from twotower.towers.request.params import GenerationParams

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

OPTIONS = EngineOptions(max_num_seqs=12, max_context=256, prefix_cache_mib=16)
Request = tuple[list[int], GenerationParams]


@pytest.fixture(scope="module", params=["tiny_a", "tiny_b"])
def towers(request: pytest.FixtureRequest) -> dict[str, Towers]:
    folder = Path(__file__).parents[2] / "golden" / request.param
    return {
        device: (load_context_tower(folder, device), load_denoiser_tower(folder, device))
        for device in ("cpu", "cuda")
    }


def engines(
    towers: Towers, *, shared: bool = True, options: EngineOptions = OPTIONS
) -> tuple[ContextEngine, DenoiserEngine]:
    context, denoiser = towers
    filling = DenoiserEngine(denoiser, pool=None if shared else options.pool_for(denoiser))
    link = LocalLink(context, filling, shared)
    return ContextEngine(context, link, options), filling


def request_of(row: int, mode: Any = "mask_diffusion", **changes: Any) -> Request:
    generator = torch.Generator().manual_seed(row)
    prompt = torch.randint(4, 200, (3 + 5 * row % 61,), generator=generator).tolist()
    return prompt, GenerationParams(**({"mode": mode, "max_tokens": 40, "seed": row} | changes))


def looping(first: int, *modes: Any) -> list[Request]:
    """Rows whose prompts repeat, so that lookups draft for them."""
    rows = [request_of(first + place, mode) for place, mode in enumerate(modes * 3)]
    return [(prompt * 2, replace(params, draft_source="lookup")) for prompt, params in rows]


async def _all(
    pair: tuple[ContextEngine, DenoiserEngine], requests: Sequence[Request]
) -> list[list[int]]:
    async def row(index: int) -> list[int]:
        blocks = generate_blocks(*pair, f"row-{index}", *requests[index])
        return [token async for block in blocks for token in block.token_ids]

    return list(await asyncio.gather(*map(row, range(len(requests)))))


def tokens(
    towers: Towers, requests: Sequence[Request], *, warm: bool = False, shared: bool = True
) -> list[list[int]]:
    pair = engines(towers, shared=shared)
    if warm:
        pair[0].warm_up()
        pair[1].warm_up(pool=pair[0].pool if shared else None)
    return asyncio.run(_all(pair, requests))


MIXED = [
    *(request_of(row) for row in range(9)),
    *(request_of(row, "ar") for row in range(9, 14)),
    *(request_of(row, "verified") for row in range(14, 18)),
    *(request_of(row, temperature=0.9, top_p=0.8) for row in range(18, 20)),
    *(request_of(row, temperature=0.7) for row in range(20, 22)),
    *looping(24, "verified", "auto"),
    request_of(22, block_size=33, max_tokens=66),
    request_of(23, block_size=5),
]


@pytest.mark.parametrize("warm", [False, True])
def test_many_rows_of_every_kind_get_the_tokens_of_the_cpu(
    towers: dict[str, Towers], warm: bool
) -> None:
    want = tokens(towers["cpu"], MIXED)
    got = tokens(towers["cuda"], MIXED, warm=warm)
    wrong = [index for index, own in enumerate(want) if own != got[index]]
    assert not wrong, f"rows {wrong}"


@pytest.mark.parametrize("shared", [True, False])
def test_pieces_of_a_prompt_do_not_overtake_each_other(
    towers: dict[str, Towers], shared: bool
) -> None:
    """Nothing waits for the device between them: what is sent for one must not be overwritten by
    the next."""
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(4, 200, (230,), generator=generator).tolist() for _ in range(3)]
    requests: list[Request] = [
        (prompt, GenerationParams(mode="ar", max_tokens=12)) for prompt in prompts
    ]
    options = replace(OPTIONS, prefill_chunk=16, max_prefill_tokens=16, prefix_cache_mib=0)
    want = asyncio.run(_all(engines(towers["cpu"], options=options), requests))
    pair = engines(towers["cuda"], shared=shared, options=options)
    pair[0].warm_up()
    pair[1].warm_up(pool=pair[0].pool if shared else None)
    assert asyncio.run(_all(pair, requests)) == want


def test_mirrors_follow_deltas(towers: dict[str, Towers]) -> None:
    want = tokens(towers["cpu"], MIXED, shared=False)
    assert tokens(towers["cuda"], MIXED, shared=False) == want


def test_a_row_gets_the_same_alone(towers: dict[str, Towers]) -> None:
    together = tokens(towers["cuda"], MIXED, warm=True)
    for index in (0, 10, 15, 22):
        assert tokens(towers["cuda"], [MIXED[index]]) == [together[index]], index


def test_engines_that_come_and_go_leave_their_memory(towers: dict[str, Towers]) -> None:
    """Graphs, workspaces and buffers of engines that are gone are free, and those of the next do
    not stand in them."""
    want = tokens(towers["cuda"], MIXED[:4], warm=True)
    used = []
    for _ in range(4):
        gc.collect()
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated())
        assert tokens(towers["cuda"], MIXED[:4], warm=True) == want
    assert used[-1] - used[1] < 8 << 20, used


def test_scores_are_those_of_the_cpu(towers: dict[str, Towers]) -> None:
    prompt, _ = request_of(12)
    scores = [asyncio.run(engines(own)[0].score(prompt)).log_probs for own in towers.values()]
    assert scores[1] == pytest.approx(scores[0], abs=2e-3)
