"""Block latency of streaming rows while a long prompt is read beside them, and the memory of it.

    python -m benchmarks.long_prompt
    python -m benchmarks.long_prompt --prompt 8192 --pairs 3

Real tower actors, a process each, with the state channel between them, on a random
checkpoint. A pair is a run with the prompt, which lasts until the prompt is read, and one of as
many blocks without it. `growth_over_chunk` is the growth of p99 of the block latency over the time
of a prefill pass that runs alone at the end of the prompt; the median of the pairs counts. Towers
that share a machine's cores slow each other down besides: what the prompt's place in the queue
costs a block is the growth of the extension alone. Memory is the anonymous memory of both actors
over that before the rows open, beside the bytes of their states in use and of their whole pools.
Prints one JSON object. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
import torch

from benchmarks.figures import median, percentile
from benchmarks.machine import machine
from benchmarks.random_checkpoint import write_random_checkpoint
from benchmarks.scheduling import BLOCK
from benchmarks.scheduling import SHAPE as MIXED_SHAPE
from benchmarks.state_memory import anonymous_bytes
from tests.support.processes import own_processes
from twotower.cluster.placement.start import start_towers
from twotower.cluster.services.tower_services import PairServices
from twotower.cluster.topology import PairTopology
from twotower.towers.decoding.generation import generate_blocks
from twotower.towers.decoding.services import Extended
from twotower.towers.engine.options import EngineOptions
from twotower.towers.request.params import GenerationParams

# Attention over the prompt must not make a chunk so long that few of them meet a block.
SHAPE = replace(MIXED_SHAPE, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
ROW_PROMPT = 64
MAX_BLOCKS = 256
# A random model is never sure of a token: the steps alone say how many passes a block takes.
STEPS = 8
LONG_ROW = "long"
ACTORS = ("ray::ContextTowerActor", "ray::DenoiserTowerActor")


def main() -> None:
    """Parses the arguments, measures, prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompt", type=int, default=32768, help="tokens of the long prompt")
    parser.add_argument("--rows", type=int, default=8, help="streaming rows")
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tt-") as folder:
        checkpoint = Path(folder) / "model"
        checkpoint.mkdir()
        write_random_checkpoint(checkpoint, SHAPE)
        print(json.dumps(asyncio.run(measure(checkpoint, args)), indent=2))


@dataclass
class Run:
    """Seconds of blocks, row by row, and of extensions; bytes of both actors at their peak."""

    blocks: list[list[float]] = field(default_factory=list)
    extensions: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    state_bytes: int = 0


class Towers:
    """Two tower actors, the prompts of a run, and names of rows that are used once."""

    def __init__(self, services: PairServices, args: argparse.Namespace) -> None:
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(4, SHAPE.vocab_size, (args.prompt,), generator=generator)
        self.long_prompt: list[int] = prompt.tolist()
        self.context, self.denoiser = services.context, services.denoiser
        self.rows = args.rows
        self.processes = [process for title in ACTORS for process in own_processes(title)]
        self._names = 0

    def name(self) -> str:
        """A row id that was never used."""
        self._names += 1
        return f"row-{self._names}"

    def num_bytes(self) -> int:
        """Anonymous memory of both actors."""
        return sum(map(anonymous_bytes, self.processes))

    async def state_bytes(self, name: str = "state_bytes") -> int:
        """A count of bytes, of both actors together."""
        stats = await asyncio.gather(self.context.stats(), self.denoiser.stats())
        return int(sum(getattr(tower, name) for tower in stats))


async def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one run of the benchmark."""
    async with actors(folder, args) as services:
        towers = Towers(services, args)
        await beside_nothing(towers, [2] * args.rows)
        chunks = await chunk_times(towers)
        pairs = []
        for _ in range(args.pairs):
            beside = await beside_the_prompt(towers)
            without = await beside_nothing(towers, [len(row) for row in beside.blocks])
            pairs.append((beside, without))
        pool_bytes = await towers.state_bytes("pool_bytes")
    return {
        "machine": machine(threads=2),
        "shape": {
            "hidden": SHAPE.hidden_size,
            "pattern": SHAPE.layer_pattern,
            "dtype": "float32",
            "rows": args.rows,
            "prompt": args.prompt,
            "passes_per_block": STEPS,
        },
        "chunk_ms": {"at_start": milli(chunks[0]), "at_end": milli(chunks[-1])},
        "without": time_figures([without for _, without in pairs]),
        "beside_prompt": time_figures([beside for beside, _ in pairs]),
        "growth_over_chunk": growth_figures(pairs, chunks[-1]),
        "memory": {
            "peak_bytes": max(beside.peak_bytes for beside, _ in pairs[1:] or pairs),
            "state_bytes": max(beside.state_bytes for beside, _ in pairs),
            "pool_bytes": pool_bytes,
        },
    }


@asynccontextmanager
async def actors(folder: Path, args: argparse.Namespace) -> AsyncIterator[PairServices]:
    """Both towers of a checkpoint as actors of a local Ray cluster."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=200 << 20,
        log_to_driver=False,
        _temp_dir=str(folder.parent),
    )
    try:
        yield await start_towers(
            PairTopology(
                model_path=str(folder),
                device="cpu",
                dtype="float32",
                engine=EngineOptions(
                    max_num_seqs=args.rows + 1,
                    max_context=args.prompt + BLOCK,
                    prefix_cache_mib=0,
                ),
                cpus_per_tower=0.4,
                gpus_per_tower=0.0,
                num_threads=1,
            )
        )
    finally:
        ray.shutdown()


async def beside_the_prompt(towers: Towers) -> Run:
    """Streams rows until the long prompt is read; blocks that ended before count."""
    read = asyncio.Event()
    async with watched(towers) as run:
        rows = [
            asyncio.ensure_future(stream(towers, run, index, MAX_BLOCKS, read))
            for index in range(towers.rows)
        ]
        await read_prompt(towers)
        read.set()
        run.blocks = await asyncio.gather(*rows)
    return run


async def beside_nothing(towers: Towers, blocks: Sequence[int]) -> Run:
    """Streams row i until it has blocks[i] latencies, without the long prompt."""
    never = asyncio.Event()
    async with watched(towers) as run:
        rows = (stream(towers, run, i, count + 1, never) for i, count in enumerate(blocks))
        run.blocks = await asyncio.gather(*rows)
    return run


async def chunk_times(towers: Towers) -> list[float]:
    """Seconds of a pass in each sixteenth of the long prompt while nothing else runs."""
    reading = asyncio.ensure_future(read_prompt(towers))
    first = last = await towers.context.stats()
    share = len(towers.long_prompt) // 16
    times: list[float] = []
    while not reading.done():
        await asyncio.sleep(0.02)
        now = await towers.context.stats()
        if now.prefill_tokens - last.prefill_tokens >= share:
            passes = now.passes - last.passes
            times.append((now.pass_seconds - last.pass_seconds) / passes)
            last = now
    await reading
    assert last is not first
    return times


async def read_prompt(towers: Towers) -> None:
    """Opens a row, reads the long prompt into it and releases it."""
    params = GenerationParams(mode="ar", max_tokens=1, seed=0)
    try:
        await towers.context.open(LONG_ROW, len(towers.long_prompt) + 1)
        await towers.context.prefill(LONG_ROW, towers.long_prompt, (), params)
    finally:
        await towers.context.release(LONG_ROW)


class TimedContext:
    """A context tower whose extensions are timed; the rest is passed on."""

    def __init__(self, context: Any, seconds: list[float]) -> None:
        self._context = context
        self._seconds = seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def extend(self, *how: Any) -> Extended:
        """Extends a row and notes how long it took, its wait for a pass included."""
        started = time.monotonic()
        extended: Extended = await self._context.extend(*how)
        self._seconds.append(time.monotonic() - started)
        return extended


async def stream(
    towers: Towers, run: Run, index: int, blocks: int, ended: asyncio.Event
) -> list[float]:
    """Latencies of a row's blocks until it has `blocks` of them or the run has ended."""
    prompt = towers.long_prompt[index * ROW_PROMPT : (index + 1) * ROW_PROMPT]
    params = GenerationParams(max_tokens=BLOCK * blocks, steps_per_block=STEPS, seed=index)
    latencies = []
    before = 0.0
    context: Any = TimedContext(towers.context, run.extensions)
    row = generate_blocks(context, towers.denoiser, towers.name(), prompt, params)
    async with aclosing(row):
        async for _ in row:
            now = time.monotonic()
            if ended.is_set():
                break
            # The first block waits for the row's prompt: not a latency between blocks.
            latencies += [now - before] if before else []
            before = now
    return latencies


@asynccontextmanager
async def watched(towers: Towers) -> AsyncIterator[Run]:
    """A run whose memory is noted while it lasts."""
    run = Run()
    start = towers.num_bytes()

    async def watch() -> None:
        while True:
            run.peak_bytes = max(run.peak_bytes, towers.num_bytes() - start)
            run.state_bytes = max(run.state_bytes, await towers.state_bytes())
            await asyncio.sleep(0.25)

    watcher = asyncio.ensure_future(watch())
    try:
        yield run
    finally:
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)


def growth_figures(pairs: Sequence[tuple[Run, Run]], chunk: float) -> dict[str, Any]:
    """The growth of p99 in units of `chunk` seconds: medians, and that of every pair's blocks."""
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
    return {"blocks": len(block_ms(runs[0])), **figures}


def milli(seconds: float) -> float:
    """Milliseconds, rounded."""
    return round(1e3 * seconds, 3)


if __name__ == "__main__":
    main()
