"""Decoding speed in process, and the share of a pass that its matrix products take.

    python -m benchmarks.decode                    # random medium model, 512-token context
    python -m benchmarks.decode --model shipped    # the model in the package
    python -m benchmarks.decode --schedule mixed   # replay recorded commit schedules

Prints one JSON object. Ratios are medians of pairs measured side by side, since machines are
shared; absolute times are of this machine alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from benchmarks.floor import counted_experts, product_sets, products
from benchmarks.machine import machine
from benchmarks.random_checkpoint import MEDIUM, write_random_checkpoint
from twotower.planner.schedules import PROFILES
from twotower.towers.checkpoint.weights import (
    SHIPPED_MODEL,
    load_context_tower,
    load_denoiser_tower,
)
from twotower.towers.decoding.generation import generate_blocks
from twotower.towers.decoding.services import Block
from twotower.towers.decoding.unmasking import CommitRule, ReplayRule
from twotower.towers.engine.context_engine import ContextEngine
from twotower.towers.engine.denoiser_engine import DenoiserEngine, commit_rule
from twotower.towers.engine.local_link import LocalLink
from twotower.towers.engine.options import EngineOptions
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.model.denoiser_tower import DenoiserTower
from twotower.towers.request.modes import Mode
from twotower.towers.request.params import GenerationParams
from twotower.towers.state.context_state import ContextState


def main() -> None:
    """Parses the arguments, measures, prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="medium", help="medium, shipped or a folder")
    parser.add_argument("--context", type=int, default=512, help="context tokens")
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1, help="rows decoded together")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens a row")
    parser.add_argument("--schedule", default="free", choices=["free", *PROFILES])
    parser.add_argument("--threshold", type=float, default=0.8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = SHIPPED_MODEL if args.model == "shipped" else Path(args.model)
        if args.model == "medium":
            folder = Path(scratch) / "medium"
            write_random_checkpoint(folder, MEDIUM)
        context, denoiser = load_context_tower(folder), load_denoiser_tower(folder)
        print(json.dumps(measure(context, denoiser, args), indent=2))


def measure(
    context: ContextTower, denoiser: DenoiserTower, args: argparse.Namespace
) -> dict[str, Any]:
    """All figures of one run."""
    prompt = torch.randint(
        4, context.config.vocab_size, (args.context,), generator=torch.Generator().manual_seed(1)
    ).tolist()
    return {
        "machine": machine(args.threads),
        "shape": {
            "hidden": context.config.hidden_size,
            "pattern": context.config.layer_pattern,
            "context": args.context,
            "block": args.block,
            "dtype": "float32",
        },
        "denoiser_pass": denoiser_share(context, denoiser, prompt, args),
        "ar_step": ar_share(context, prompt, args),
        "decode": {
            mode: decode(context, denoiser, prompt, mode, args) for mode in ("mask_diffusion", "ar")
        },
    }


def denoiser_share(
    context: ContextTower, denoiser: DenoiserTower, prompt: list[int], args: argparse.Namespace
) -> dict[str, float]:
    """Figures of a denoiser pass over a block, with the head over all positions."""
    state = read_prompt(context, prompt, args.block)
    vocab = denoiser.config.vocab_size
    tokens = torch.randint(4, vocab, (args.block,)).tolist()

    def hidden() -> torch.Tensor:
        return denoiser.forward([tokens], [0.5], [state])

    with counted_experts() as experts:
        hidden()
    return share(denoiser, args.block, experts, hidden, args.repeats)


def ar_share(
    context: ContextTower, prompt: list[int], args: argparse.Namespace
) -> dict[str, float]:
    """Figures of an autoregressive step: a pass over one token, which advances the state, and the
    head."""
    state = read_prompt(context, prompt, args.repeats + 8)

    def hidden() -> torch.Tensor:
        out = context.forward([prompt[:1]], [state])
        context.advance(state, 1)
        return out

    with counted_experts() as experts:
        hidden()
    return share(context, 1, experts, hidden, args.repeats)


def share(
    tower: ContextTower | DenoiserTower,
    tokens: int,
    experts: list[dict[int, int]],
    hidden: Callable[[], torch.Tensor],
    repeats: int,
) -> dict[str, float]:
    """Median times of a pass over so many tokens and of its floor, and the median of their ratios,
    each of a pass and a floor side by side. `experts` are rows by expert of each MoE layer."""
    floor_sets = [product_sets(products(tower, tokens, rows, experts)) for rows in (tokens, 0)]
    tower.logits(hidden())
    rounds = []
    for _ in range(repeats):
        body, out = timed(hidden)
        tail, _ = timed(lambda out=out: tower.logits(out))  # type: ignore[misc]
        floors = [min(timed(work)[0] for work in works) for works in floor_sets]
        rounds.append((body + tail, body, *floors))
    return {
        "ms": round(1e3 * statistics.median(r[0] for r in rounds), 3),
        "floor_ms": round(1e3 * statistics.median(r[2] for r in rounds), 3),
        "share_of_floor": round(statistics.median(r[2] / r[0] for r in rounds), 3),
        "share_without_head": round(statistics.median(r[3] / r[1] for r in rounds), 3),
        "unique_experts": sum(map(len, experts)) / max(1, len(experts)),
    }


def decode(
    context: ContextTower,
    denoiser: DenoiserTower,
    prompt: list[int],
    mode: Mode,
    args: argparse.Namespace,
) -> dict[str, float]:
    """Speed of rows through the engines, without their prefill and first block."""
    schedule = cycle(PROFILES[args.schedule]) if args.schedule != "free" else None

    def rule(params: GenerationParams) -> CommitRule:
        return ReplayRule(next(schedule)) if schedule is not None else commit_rule(params)

    denoising = DenoiserEngine(denoiser, rule=rule)
    link = LocalLink(context, denoising, shared=True)
    reading = ContextEngine(context, link, EngineOptions(prefix_cache_mib=0))
    params = GenerationParams(
        mode=mode,
        max_tokens=args.tokens,
        block_size=args.block,
        confidence_threshold=args.threshold,
        seed=0,
        commit_rule="released",
    )

    async def rows() -> list[tuple[float, int, int]]:
        blocks = [
            generate_blocks(reading, denoising, f"{index}", prompt, params)
            for index in range(args.batch)
        ]
        return list(await asyncio.gather(*map(counted_row, blocks)))

    done = asyncio.run(rows())
    seconds = max(r[0] for r in done)
    passes = denoising.stats() if mode != "ar" else reading.stats()
    return {
        "tokens_per_s": round(sum(r[1] for r in done) / seconds, 1),
        "passes_per_s": round(passes.passes / passes.pass_seconds, 1),
        "tokens_per_nfe": round(sum(r[1] for r in done) / max(1, sum(r[2] for r in done)), 3),
    }


async def counted_row(blocks: AsyncIterator[Block]) -> tuple[float, int, int]:
    """Seconds, tokens and denoiser passes (NFE) of a row from the end of its first block on."""
    await anext(blocks)
    started = time.perf_counter()
    count = nfe = 0
    async for block in blocks:
        count += len(block.token_ids)
        nfe += block.nfe
    return time.perf_counter() - started, count, nfe


def read_prompt(context: ContextTower, prompt: list[int], room: int) -> ContextState:
    """A state that has read the prompt, with room for `room` tokens more."""
    state = context.new_state(len(prompt) + room)
    for start in range(0, len(prompt), 64):
        piece = prompt[start : start + 64]
        context.forward([piece], [state])
        context.advance(state, len(piece))
    return state


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result of one call."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


if __name__ == "__main__":
    main()
