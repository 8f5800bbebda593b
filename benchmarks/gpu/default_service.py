"""Both towers on one device with the memory that a service takes by default:
`python -m benchmarks.gpu.default_service --out FILE`.

Allocates the pool, captures all graphs, then reads long prompts beside rows that decode, scores a
text and samples with filters, to find out whether a service under load would run out of memory.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
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
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.model.denoiser_tower import DenoiserTower
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
    found: Entry = {"rows": args.rows, "prompt": args.prompt}

    @contextmanager
    def noted(name: str) -> Iterator[None]:
        """Adds the seconds of a step and the memory that it leaves free to the figures."""
        begun = time.monotonic()
        yield
        synchronize(device)
        found[f"{name}_s"] = round(time.monotonic() - begun, 2)
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            found[f"{name}_free_gb"] = round(free / 1e9, 2)
            found["memory_gb"] = round(total / 1e9, 2)
        print(json.dumps(found), flush=True)
        args.out.write_text(json.dumps(found, indent=1), encoding="utf-8")

    with noted("towers"):
        towers = _towers(args, device)
    with noted("pool"):
        context, denoiser = _engines(*towers)
        found["pool"] = {name: getattr(context.stats(), name) for name in POOL}
    with noted("warm_up"):
        context.warm_up()
        denoiser.warm_up(pool=context.pool)
    with noted("load"):
        found["tokens"] = asyncio.run(_load(context, denoiser, args.rows, args.prompt))
        found["passes"] = [context.stats().passes, denoiser.stats().passes]
    left = context.stats()
    assert not left.rows, left
    assert not left.slots_used, left


def _towers(args: argparse.Namespace, device: torch.device) -> tuple[ContextTower, DenoiserTower]:
    """Both towers with random weights, in bf16 on a GPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    maker = TowerMaker(PRESETS[args.preset], device, dtype, generator, args.experts)
    towers = maker.context(), maker.denoiser()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return towers


def _engines(
    context_tower: ContextTower, denoiser_tower: DenoiserTower
) -> tuple[ContextEngine, DenoiserEngine]:
    """Both engines with a service's default options, over one pool."""
    denoiser = DenoiserEngine(denoiser_tower)
    link = LocalLink(context_tower, denoiser, shared=True)
    pool = EngineOptions().pool_for(context_tower, denoiser_tower)
    return ContextEngine(context_tower, link, pool=pool), denoiser


async def _load(context: ContextEngine, denoiser: DenoiserEngine, rows: int, prompt: int) -> int:
    """Generates rows of every kind at once and scores a text; returns the number of tokens."""
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
        return len((await context.score(tokens(rows))).log_probs)

    works: list[Coroutine[Any, Any, int]] = [row(index) for index in range(rows)]
    return sum(await asyncio.gather(*works, score()))


if __name__ == "__main__":
    main()
