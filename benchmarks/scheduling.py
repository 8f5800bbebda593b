"""Denoiser passes and makespan of many rows that replay recorded commit schedules.

    python -m benchmarks.scheduling
    python -m benchmarks.scheduling --rows 64 --width 32 --profile code

Real engines on a random checkpoint, the passes of each tower in a thread. `passes_over_ideal`
is the denoiser's passes over (sum of all rows' steps) / width; beside it the same schedules in
lockstep. `makespan_over_busier` is the wall time of a run over the pass time of the tower that
worked longer. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures import median
from benchmarks.machine import machine
from benchmarks.random_checkpoint import MEDIUM, write_random_checkpoint
from twotower.planner.schedules import PROFILES, Replay, Schedule, draw_rows, lockstep_passes
from twotower.towers.decoding.generation import generate_blocks
from twotower.towers.engine.load import load_engines
from twotower.towers.engine.options import EngineOptions
from twotower.towers.engine.stats import EngineStats
from twotower.towers.request.params import GenerationParams

# Large enough that passes are matrix products, small enough for a thousand of them a minute.
SHAPE = replace(
    MEDIUM,
    vocab_size=1024,
    hidden_size=192,
    layer_pattern="MEM*E",
    num_attention_heads=4,
    head_dim=32,
    mamba_num_heads=8,
    mamba_head_dim=32,
    ssm_state_size=32,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=128,
    moe_shared_expert_intermediate_size=256,
)
BLOCK = 16


def main() -> None:
    """Parses the arguments, measures, prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--width", type=int, default=16, help="rows of a denoiser pass")
    parser.add_argument("--blocks", type=int, default=32, help="blocks a row")
    parser.add_argument("--prompt", type=int, default=32, help="prompt tokens")
    parser.add_argument("--profile", default="mixed", choices=list(PROFILES))
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_random_checkpoint(Path(folder), SHAPE)
        print(json.dumps(measure(Path(folder), args), indent=2))


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All figures: medians over runs, each with other schedules."""
    asyncio.run(run(folder, draw_rows(args.profile, args.width, 1, 0), args))
    runs = [
        asyncio.run(run(folder, draw_rows(args.profile, args.rows, args.blocks, seed), args))
        for seed in range(args.repeats)
    ]
    by_name = {name: [found[name] for found in runs] for name in runs[0]}
    return {
        "machine": machine(threads=2),
        "shape": {
            "hidden": SHAPE.hidden_size,
            "pattern": SHAPE.layer_pattern,
            "dtype": "float32",
            "rows": args.rows,
            "width": args.width,
            "blocks": args.blocks,
            "prompt": args.prompt,
            "profile": args.profile,
        },
        "median": {name: median(values) for name, values in by_name.items()},
        "worst": {
            name: max(by_name[name]) for name in ("passes_over_ideal", "makespan_over_busier")
        },
    }


async def run(
    folder: Path, rows: Sequence[Sequence[Schedule]], args: argparse.Namespace
) -> dict[str, float]:
    """Figures of a run of all rows at once through fresh engines."""
    options = EngineOptions(
        max_num_seqs=len(rows),
        max_context=args.prompt + BLOCK * len(rows[0]),
        max_rows_per_pass=args.width,
    )
    context, denoiser = load_engines(
        folder,
        "cpu",
        "cpu",
        torch.float32,
        options=options,
        threaded=True,
        rule=Replay(rows),
    )
    prompt = torch.arange(4, 4 + args.prompt).tolist()

    async def row(index: int) -> None:
        tokens = BLOCK * len(rows[index])
        params = GenerationParams(max_tokens=tokens, seed=index, commit_rule="released")
        async for _ in generate_blocks(context, denoiser, f"row-{index}", prompt, params):
            pass

    started = time.monotonic()
    await asyncio.gather(*(row(index) for index in range(len(rows))))
    makespan = time.monotonic() - started
    return figures(rows, args.width, makespan, context.stats(), denoiser.stats())


def figures(
    rows: Sequence[Sequence[Schedule]],
    width: int,
    makespan: float,
    reading: EngineStats,
    denoising: EngineStats,
) -> dict[str, float]:
    """Passes and seconds of a run from the counters of its context and denoiser engines, against
    an ideal and a lockstep run of the same schedules. Raises RuntimeError if steps are missing."""
    steps = sum(len(block) for blocks in rows for block in blocks)
    if denoising.pass_rows != steps:
        raise RuntimeError(f"denoiser steps: got {denoising.pass_rows}, expected {steps}")
    ideal = math.ceil(steps / width)
    busier = max(reading.pass_seconds, denoising.pass_seconds)
    return {
        "steps": steps,
        "ideal_passes": ideal,
        "passes": denoising.passes,
        "passes_over_ideal": round(denoising.passes / ideal, 4),
        "lockstep_over_ideal": round(lockstep_passes(rows, width) / ideal, 4),
        "makespan_s": makespan,
        "makespan_over_busier": round(makespan / busier, 4),
        "denoiser_pass_ms": 1e3 * denoising.pass_seconds / denoising.passes,
        "denoiser_busy_s": denoising.pass_seconds,
        "denoiser_busy_share": denoising.pass_seconds / makespan,
        "context_passes": reading.passes,
        "context_busy_s": reading.pass_seconds,
        "context_busy_share": reading.pass_seconds / makespan,
    }


if __name__ == "__main__":
    main()
