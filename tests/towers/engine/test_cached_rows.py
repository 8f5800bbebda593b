"""The prefix cache inside the engine: a hit gives the bits of a miss, and costs fewer passes."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.rows import OPTIONS, Pair, tokens_of
from twotower.towers.decoding.services import Block
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.model.denoiser_tower import DenoiserTower
from twotower.towers.request.params import GenerationParams

CACHED = replace(OPTIONS, prefix_cache_mib=8)
# Of the denoiser alone: rounds that a policy chooses follow the pace of the machine.
PARAMS = GenerationParams(
    max_tokens=24, block_size=8, temperature=1.0, seed=3, draft_source="denoiser"
)
MODES = ["mask_diffusion", "ar", "mock_ar", "verified"]


def prompt_of(length: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 96, (length,), generator=generator).tolist()


@pytest.fixture(params=[True, False], ids=["shared", "mirrored"])
def towers(
    request: pytest.FixtureRequest, context_tower: ContextTower, denoiser_tower: DenoiserTower
) -> dict[str, Any]:
    return {"context": context_tower, "denoiser": denoiser_tower, "shared": request.param}


def without_costs(blocks: list[Block]) -> list[Block]:
    return [replace(block, context_passes=0, cached_tokens=0) for block in blocks]


# One piece, a whole page, and several pieces; the modes differ in how the last token is read.
@pytest.mark.parametrize(
    ("mode", "length"),
    [
        ("mask_diffusion", 5),
        ("mask_diffusion", 64),
        ("mask_diffusion", 300),
        ("ar", 64),
        ("mock_ar", 64),
        ("verified", 300),
    ],
)
def test_a_repeated_prompt_is_not_read_again(
    towers: dict[str, Any], mode: Any, length: int
) -> None:
    pair = Pair.of(**towers, options=CACHED)
    params, prompt = replace(PARAMS, mode=mode), prompt_of(length)
    miss = asyncio.run(pair.blocks("first", prompt, params))
    hit = asyncio.run(pair.blocks("second", prompt, params))
    plain = asyncio.run(Pair.of(**towers).blocks("row", prompt, params))
    assert without_costs(hit) == without_costs(miss) == without_costs(plain)
    assert miss[0].cached_tokens == 0
    assert hit[0].cached_tokens == (length - 1 if mode == "mock_ar" else length)
    assert hit[0].context_passes < miss[0].context_passes
    pair.assert_empty()


@pytest.mark.parametrize("mode", MODES)
def test_a_shared_head_is_not_read_again(towers: dict[str, Any], mode: Any) -> None:
    pair = Pair.of(**towers, options=CACHED)
    params, head = replace(PARAMS, mode=mode), prompt_of(280)
    asyncio.run(pair.blocks("first", head, replace(params, max_tokens=8)))
    other = [*head[:260], *prompt_of(70, seed=2)]
    hit = asyncio.run(pair.blocks("second", other, params))
    plain = asyncio.run(Pair.of(**towers).blocks("row", other, params))
    assert without_costs(hit) == without_costs(plain)
    assert hit[0].cached_tokens == 256


def test_a_prompt_that_only_begins_alike_in_another_cut_is_a_miss(towers: dict[str, Any]) -> None:
    pair = Pair.of(**towers, options=CACHED)
    prompt = prompt_of(40)
    asyncio.run(pair.blocks("first", prompt, PARAMS))
    longer = asyncio.run(pair.blocks("second", [*prompt, 7], PARAMS))
    assert longer[0].cached_tokens == 0


def test_a_resumed_row_starts_from_a_block_end(towers: dict[str, Any]) -> None:
    pair = Pair.of(**towers, options=CACHED)
    params = replace(PARAMS, max_tokens=320, confidence_threshold=0.05)
    prompt = prompt_of(30)
    whole = asyncio.run(pair.blocks("first", prompt, params))
    tail = asyncio.run(pair.blocks("again", prompt, params, tokens_of(whole[:-2])))
    assert tail[0].cached_tokens >= 256
    assert without_costs(tail) == without_costs(whole[-2:])


def test_rows_at_the_same_time_share_pages_without_disturbing_each_other(
    towers: dict[str, Any],
) -> None:
    pair = Pair.of(**towers, options=CACHED)
    prompt = prompt_of(100)
    asyncio.run(pair.blocks("first", prompt, PARAMS))

    async def run() -> list[list[Block]]:
        rows = [pair.blocks(f"{s}", prompt, replace(PARAMS, seed=s)) for s in range(6)]
        return list(await asyncio.gather(*rows))

    together = asyncio.run(run())
    plain = Pair.of(**towers)
    for seed, blocks in enumerate(together):
        assert blocks[0].cached_tokens == 100
        alone = asyncio.run(plain.blocks("row", prompt, replace(PARAMS, seed=seed)))
        assert without_costs(blocks) == without_costs(alone)
    pair.assert_empty()


def test_the_cache_gives_way_to_rows(towers: dict[str, Any]) -> None:
    """A pool of two rows' pages: what the cache holds never keeps a row from running."""
    options = replace(CACHED, max_num_seqs=2, max_context=192)
    pair = Pair.of(**towers, options=options)

    async def run() -> list[list[Block]]:
        rows = [pair.blocks(f"{s}", prompt_of(150, seed=s), PARAMS) for s in range(9)]
        return list(await asyncio.gather(*rows))

    blocks = asyncio.run(asyncio.wait_for(run(), 120))
    assert all(len(tokens_of(row)) == 24 for row in blocks)
    stats = pair.context.stats()
    assert stats.pages_used <= stats.pages == 6
    pair.assert_empty()
