"""Block latency of streaming rows while a long prompt is read beside them, and the memory of it.

    python -m benchmarks.long_prompt
    python -m benchmarks.long_prompt --prompt 8192 --pairs 3

Real engines on a random checkpoint, each tower's passes in a thread of its own. A pair is a run
with the prompt, which lasts until the prompt is read, and one of the same blocks without it.
`growth_over_chunk` is what p99 of the block latency grows by, over the time of a prefill pass that
runs alone at the end of the prompt. Towers that share a machine slow each other down besides: what
the prompt's place in the queue costs a block is the growth of the extension alone, and
`denoiser_pass_ms` shows the rest. Memory is anonymous memory over that before the rows open, on
engines that have run before, beside the bytes of the states in use and of the whole pool.
Prints one JSON object. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures import median, percentile
from benchmarks.machine import machine
from benchmarks.memory import anonymous_bytes
from benchmarks.random_checkpoint import write_random_checkpoint
from benchmarks.schedules import draw_rows, replaying
from benchmarks.scheduling import BLOCK
from benchmarks.scheduling import SHAPE as MIXED_SHAPE
from twotower.towers.context_engine import ContextEngine
from twotower.towers.denoiser_engine import DenoiserEngine
from twotower.towers.engine import EngineOptions
from twotower.towers.generation import generate_blocks
from twotower.towers.link import load_engines
from twotower.towers.memory import MemoryBudget
from twotower.towers.params import GenerationParams

# Attention over the prompt must not make a chunk so long that few of them meet a block.
SHAPE = replace(MIXED_SHAPE, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
ROW_PROMPT = 64
MAX_BLOCKS = 256
DRAWN_BLOCKS = 64
LONG_ROW = "long"


def main() -> None:
    """Parses the arguments, measures, prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompt", type=int, default=32768, help="tokens of the long prompt")
    parser.add_argument("--rows", type=int, default=8, help="streaming rows")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--profile", default="mixed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_random_checkpoint(Path(folder), SHAPE)
        print(json.dumps(asyncio.run(measure(Path(folder), args)), indent=2))


@dataclass(frozen=True)
class Engines:
    """Both engines and the prompts of a run."""

    context: ContextEngine
    denoiser: DenoiserEngine
    rows: int
    long_prompt: list[int]


@dataclass
class Run:
    """Seconds of blocks, row by row, and of extensions and a denoiser pass; bytes at their peak."""

    blocks: list[list[float]] = field(default_factory=list)
    extensions: list[float] = field(default_factory=list)
    denoiser_pass: float = 0.0
    peak_bytes: int = 0
    state_bytes: int = 0


async def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one run of the benchmark."""
    schedules = draw_rows(args.profile, args.rows, DRAWN_BLOCKS, 0)

    async def engines() -> Engines:
        # Fresh for every run, so that all replay the same schedules.
        room = MemoryBudget(max_num_seqs=args.rows + 1, max_context=args.prompt + BLOCK)
        context, denoiser = load_engines(
            folder,
            "cpu",
            "cpu",
            torch.float32,
            options=EngineOptions(room, prefix_cache_bytes=0),
            threaded=True,
            rule=replaying(schedules),
        )
        prompt = torch.randint(
            4, SHAPE.vocab_size, (args.prompt,), generator=torch.Generator().manual_seed(0)
        )
        fresh = Engines(context, denoiser, args.rows, prompt.tolist())
        await beside_nothing(fresh, [1] * args.rows)
        return fresh

    alone = await chunk_times(await engines())
    pairs = []
    for _ in range(args.pairs):
        beside = await beside_the_prompt(await engines())
        without = await beside_nothing(await engines(), [len(row) for row in beside.blocks])
        pairs.append((beside, without))
    chunk = statistics.median(alone[-len(alone) // 16 :])
    return {
        "machine": machine(threads=2),
        "shape": {
            "hidden": SHAPE.hidden_size,
            "pattern": SHAPE.layer_pattern,
            "dtype": "float32",
            "rows": args.rows,
            "prompt": args.prompt,
            "profile": args.profile,
        },
        "chunk_ms": {
            "passes": len(alone),
            "at_start": milli(statistics.median(alone[: len(alone) // 16])),
            "at_end": milli(chunk),
        },
        "without": time_figures([without for _, without in pairs]),
        "beside_prompt": time_figures([beside for beside, _ in pairs]),
        "growth_over_chunk": growth_figures(pairs, chunk),
        "memory": await memory_figures(await engines()),
    }


async def beside_the_prompt(engines: Engines) -> Run:
    """Rows stream until the long prompt is read; blocks that were whole by then count."""
    read = asyncio.Event()
    async with watched(engines) as run:
        rows = [
            asyncio.ensure_future(stream(engines, index, MAX_BLOCKS, read))
            for index in range(engines.rows)
        ]
        await read_prompt(engines)
        read.set()
        run.blocks = await asyncio.gather(*rows)
    return run


async def beside_nothing(engines: Engines, blocks: Sequence[int]) -> Run:
    """Row i streams until it has blocks[i] latencies."""
    never = asyncio.Event()
    async with watched(engines) as run:
        rows = (stream(engines, i, count + 1, never) for i, count in enumerate(blocks))
        run.blocks = await asyncio.gather(*rows)
    return run


async def chunk_times(engines: Engines) -> list[float]:
    """Seconds of every pass of the long prompt while nothing else runs."""
    reading = asyncio.ensure_future(read_prompt(engines))
    times: list[float] = []
    before = engines.context.stats()
    while not reading.done():
        await asyncio.sleep(0.001)
        now = engines.context.stats()
        if passes := int(now["passes"] - before["passes"]):
            times += [(now["pass_seconds"] - before["pass_seconds"]) / passes] * passes
            before = now
    await reading
    return times


async def read_prompt(engines: Engines) -> None:
    """Opens a row, reads the long prompt into it and gives it up."""
    params = GenerationParams(mode="ar", max_tokens=1, seed=0)
    try:
        await engines.context.open(LONG_ROW, len(engines.long_prompt) + 1)
        await engines.context.prefill(LONG_ROW, engines.long_prompt, (), params)
    finally:
        await engines.context.release(LONG_ROW)


async def stream(engines: Engines, index: int, blocks: int, ended: asyncio.Event) -> list[float]:
    """Latencies of a row's blocks until it has `blocks` of them or the run has ended."""
    prompt = engines.long_prompt[index * ROW_PROMPT : (index + 1) * ROW_PROMPT]
    params = GenerationParams(max_tokens=BLOCK * blocks, seed=index)
    latencies = []
    before = 0.0
    row = generate_blocks(engines.context, engines.denoiser, f"row-{index}", prompt, params)
    async with aclosing(row):
        async for _ in row:
            now = time.monotonic()
            if ended.is_set():
                break
            # The first block waits for the row's own prompt: not a latency between blocks.
            latencies += [now - before] if before else []
            before = now
    return latencies


@asynccontextmanager
async def watched(engines: Engines) -> AsyncIterator[Run]:
    """A run whose extensions, passes and memory are noted while it lasts."""
    run = Run()
    start = anonymous_bytes()
    extend = engines.context.extend

    async def timed(row_id: str, token_ids: Sequence[int]) -> int:
        started = time.monotonic()
        passes = await extend(row_id, token_ids)
        run.extensions.append(time.monotonic() - started)
        return passes

    async def watch() -> None:
        while True:
            run.peak_bytes = max(run.peak_bytes, anonymous_bytes() - start)
            run.state_bytes = max(run.state_bytes, int(engines.context.stats()["state_bytes"]))
            await asyncio.sleep(0.02)

    engines.context.extend = timed  # type: ignore[method-assign]
    watcher = asyncio.ensure_future(watch())
    try:
        yield run
    finally:
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)
    stats = engines.denoiser.stats()
    run.denoiser_pass = stats["pass_seconds"] / stats["passes"]


def growth_figures(pairs: Sequence[tuple[Run, Run]], chunk: float) -> dict[str, Any]:
    """What p99 grows by, in times of a chunk of `chunk` s: the medians, and every pair's blocks."""
    blocks, extensions = (
        [(percentile(of(a), 99) - percentile(of(b), 99)) / milli(chunk) for a, b in pairs]
        for of in (block_ms, extension_ms)
    )
    return {
        "block": median(blocks),
        "extension": median(extensions),
        "block_pairs": [round(each, 3) for each in blocks],
    }


def block_ms(run: Run) -> list[float]:
    """Latencies of all rows' blocks."""
    return [1e3 * latency for row in run.blocks for latency in row]


def extension_ms(run: Run) -> list[float]:
    """Times of all rows' extensions, their wait for a pass included."""
    return [1e3 * seconds for seconds in run.extensions]


def time_figures(runs: Sequence[Run]) -> dict[str, float]:
    """Medians over runs, in ms."""
    figures = {
        f"{name}_p{percent}_ms": median(percentile(of(run), percent) for run in runs)
        for name, of in (("block", block_ms), ("extension", extension_ms))
        for percent in (50, 99)
    }
    passes = median(1e3 * run.denoiser_pass for run in runs)
    return {"blocks": len(block_ms(runs[0])), **figures, "denoiser_pass_ms": passes}


async def memory_figures(engines: Engines) -> dict[str, int]:
    """What memory grows by, beside the bytes of the states in use and of the whole budget."""
    # The first passes of every width take buffers once and for all, whatever the prompt's length.
    short = engines.long_prompt[: len(engines.long_prompt) // 8]
    await beside_the_prompt(replace(engines, long_prompt=short))
    run = await beside_the_prompt(engines)
    return {
        "peak_bytes": run.peak_bytes,
        "state_bytes": run.state_bytes,
        "pool_bytes": int(engines.context.stats()["pool_bytes"]),
    }


def milli(seconds: float) -> float:
    """Milliseconds, rounded."""
    return round(1e3 * seconds, 3)


if __name__ == "__main__":
    main()
