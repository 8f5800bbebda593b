"""Both towers on one device with the memory that a service takes by default:
`python -m benchmarks.gpu.default_service --out FILE`.

Fills the pool's share, captures all graphs, then reads long prompts beside rows that decode, scores
a text and draws with filters: what runs out of memory here would do so in a service under load.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import torch

from twotower.bench.random_towers import TowerMaker
from twotower.bench.timing import synchronize
from twotower.planner.shapes import PRESETS
from twotower.towers.decoding.generation import generate_blocks
from twotower.towers.engine.context_engine import ContextEngine
from twotower.towers.engine.denoiser_engine import DenoiserEngine
from twotower.towers.engine.local_link import LocalLink
from twotower.towers.engine.options import EngineOptions
from twotower.towers.request.params import GenerationParams

Entry = dict[str, Any]
# Counters of a pool.
POOL = ("slots", "slots_used", "pages", "pages_used", "state_bytes", "pool_bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="30b", choices=list(PRESETS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--experts", default="full")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=3000)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found: Entry = {"rows": args.rows, "prompt": args.prompt}

    def note(name: str, begun: float) -> None:
        synchronize(device)
        found[f"{name}_s"] = round(time.monotonic() - begun, 2)
        if device.type == "cuda":
            free, there = torch.cuda.mem_get_info(device)
            found[f"{name}_free_gb"] = round(free / 1e9, 2)
            found["memory_gb"] = round(there / 1e9, 2)
        print(json.dumps(found), flush=True)
        args.out.write_text(json.dumps(found, indent=1), encoding="utf-8")

    begun = time.monotonic()
    generator = torch.Generator(device).manual_seed(0)
    maker = TowerMaker(PRESETS[args.preset], device, dtype, generator, args.experts)
    context_tower, denoiser_tower = maker.context(), maker.denoiser()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    note("towers", begun)

    begun = time.monotonic()
    denoiser = DenoiserEngine(denoiser_tower)
    link = LocalLink(context_tower, denoiser, shared=True)
    pool = EngineOptions().pool_for(context_tower, denoiser_tower)
    context = ContextEngine(context_tower, link, pool=pool)
    found |= {"pool": {name: getattr(context.stats(), name) for name in POOL}}
    note("pool", begun)

    begun = time.monotonic()
    context.warm_up()
    denoiser.warm_up(pool=context.pool)
    note("warm_up", begun)

    begun = time.monotonic()
    found["tokens"] = asyncio.run(_load(context, denoiser, args.rows, args.prompt))
    found["passes"] = [context.stats().passes, denoiser.stats().passes]
    note("load", begun)
    left = context.stats()
    assert not left.rows, left
    assert not left.slots_used, left


async def _load(context: ContextEngine, denoiser: DenoiserEngine, rows: int, prompt: int) -> int:
    """Rows of every kind at once; the tokens that they made."""
    vocab = context.tower.config.vocab_size

    def tokens(row: int) -> list[int]:
        generator = torch.Generator().manual_seed(row)
        drawn: list[int] = torch.randint(4, vocab, (prompt,), generator=generator).tolist()
        return drawn

    kinds: list[Entry] = [
        {"mode": "mask_diffusion"},
        {"mode": "ar"},
        {"mode": "verified"},
        {"mode": "mask_diffusion", "temperature": 0.8, "top_p": 0.9},
        {"mode": "mask_diffusion", "block_size": 64},
    ]

    async def row(index: int) -> int:
        params = GenerationParams(max_tokens=32, seed=index, **kinds[index % len(kinds)])
        blocks = generate_blocks(context, denoiser, f"row-{index}", tokens(index), params)
        return sum([len(block.token_ids) async for block in blocks])

    async def score() -> int:
        return len(await context.score(tokens(rows)))

    works: list[Coroutine[Any, Any, int]] = [row(index) for index in range(rows)]
    return sum(await asyncio.gather(*works, score()))


if __name__ == "__main__":
    main()
