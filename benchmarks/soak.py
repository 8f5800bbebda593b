"""Thousands of short mixed requests, a fifth of them cancelled midway; then nothing may be left.

    python -m benchmarks.soak [--requests 10000] [--rows 16] [--in-flight 48]

The classes of the tower actors with a gRPC state link between them, in one process without Ray, on
a tiny random checkpoint, with a prefix cache. After every thousand requests the pair is idle for a
moment: then no row, slot, mirror, queue entry or waiting piece of work may be left on either side
and no task beyond the link's; in the end, once the prefix cache is empty, no page either. A refused
request is sent again a little later. One in a hundred of those that were not cancelled is generated
again alone, without a prefix cache. Prints one JSON object; the exit code is 1 if anything is left,
differs or has failed, if Python's objects have become more after the first thousand, or if memory
grew by more than `--max-growth-mib` in the last third of the run.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.in_process import load_local
from benchmarks.machine import machine
from benchmarks.phases import PhasedLink, PhasedTower, Phases
from benchmarks.random_checkpoint import MEDIUM, write_random_checkpoint
from benchmarks.soak_requests import PIECE, RequestMaker, SoakRequest
from twotower import Request
from twotower.cluster.services.actors import ContextTowerActor, DenoiserTowerActor
from twotower.cluster.services.tower_services import PairServices
from twotower.cluster.topology import PairTopology
from twotower.deployments.pair.tower_pair import Job, TowerPair
from twotower.towers.engine.context_engine import ContextEngine
from twotower.towers.engine.options import EngineOptions
from twotower.towers.errors import QueueFullError, TwoTowerError

SHAPE = replace(
    MEDIUM,
    vocab_size=96,
    hidden_size=32,
    layer_pattern="M*E",
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    mamba_num_heads=4,
    mamba_head_dim=8,
    n_groups=2,
    ssm_state_size=128,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    moe_shared_expert_intermediate_size=32,
    intermediate_size=32,
    max_position_embeddings=256,
)
EOS = 2
MAX_CONTEXT = 256
# So small that entries are evicted for lack of bytes as well as for lack of pages.
CACHE_MIB = 1
ROUND = 1000
SETTLE_S = 5.0
MAX_OBJECT_GROWTH = 1.01
RETRY_S = 0.1
# Counters that must be zero on a side once all requests have ended.
GONE = ("rows", "pending_work", "slots_used", "pages_used", "queued_rows", "mirrors")
CACHED = ("context", "pages_used")


class Soak:
    """A linked pair of towers, and the outcomes of the requests."""

    def __init__(self, topology: PairTopology, phases: Phases) -> None:
        self.outcomes: Counter[str] = Counter()
        self.refused = 0
        self.outputs: list[tuple[SoakRequest, list[int]]] = []
        self._context = ContextTowerActor(topology)
        self._denoiser = DenoiserTowerActor(topology)
        self._phases = phases
        self._pair = TowerPair(self._start)
        self._names = itertools.count()

    @property
    def engine(self) -> ContextEngine:
        """The context tower's engine."""
        return self._context.engine

    async def start(self) -> None:
        """Loads and links the towers."""
        await self._pair.check_health()

    async def close(self) -> None:
        """Ends the link."""
        await self._context.close()
        await self._denoiser.close()

    async def run(self, requests: Iterator[SoakRequest], in_flight: int) -> None:
        """Sends all requests, so many at a time, and waits for their ends."""

        async def take_turns() -> None:
            for request in requests:
                await self._end(request)

        await asyncio.gather(*(take_turns() for _ in range(in_flight)))

    async def left(self, *, cached_pages: bool) -> dict[str, float]:
        """The counters that are not zero, though they should be, at most SETTLE_S later."""
        deadline = time.monotonic() + SETTLE_S
        while (
            left := held(await self._pair.stats(), cached_pages)
        ) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        return left

    async def stats(self) -> dict[str, dict[str, float]]:
        """Counters of each tower, by tower."""
        return await self._pair.stats()

    async def _start(self) -> PairServices:
        await self._context.load()
        await self._denoiser.load()
        link = await self._denoiser.listen("soak")
        await self._context.connect(0, replace(link, epoch=1))
        link = self.engine.link
        assert link is not None
        self.engine.link = PhasedLink(link, self._phases)
        context, denoiser = (
            PhasedTower(tower, self._phases) for tower in (self._context, self._denoiser)
        )
        return PairServices(context, denoiser)

    async def _end(self, request: SoakRequest) -> None:
        """Sends a request until it is not refused, and notes its outcome."""
        while True:
            row_id = f"row-{next(self._names)}"
            task = asyncio.create_task(self._tokens(row_id, request))
            self._phases.follow(row_id, task, request.cancel)
            await asyncio.wait([task])
            self._phases.forget(row_id)
            if not _refused(task):
                break
            self.refused += 1
            await asyncio.sleep(RETRY_S)
        self._note(request, task)

    async def _tokens(self, row_id: str, request: SoakRequest) -> list[int]:
        blocks = self._pair.generate(Job(row_id, request.prompt, (), request.params))
        async with aclosing(blocks):
            return [token async for block in blocks for token in block.token_ids]

    def _note(self, request: SoakRequest, task: asyncio.Task[list[int]]) -> None:
        if task.cancelled():
            self.outcomes["cancelled"] += 1
            return
        error = task.exception()
        if isinstance(error, TwoTowerError):
            self.outcomes[f"failed: {type(error).__name__}: {error}"] += 1
        elif error is not None:
            raise error
        else:
            self.outcomes["completed"] += 1
            if request.checked:
                self.outputs.append((request, task.result()))


def main() -> int:
    """Parses the arguments, soaks, prints JSON; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=16, help="rows in the towers at once")
    parser.add_argument("--waiting", type=int, default=28, help="rows that may wait for them")
    parser.add_argument("--in-flight", type=int, default=48, help="requests sent at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-growth-mib", type=float, default=16.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_random_checkpoint(folder, SHAPE)
        figures = asyncio.run(soak(folder, args))
    print(json.dumps(figures, indent=2))
    return 0 if passed(figures, args.max_growth_mib) else 1


def topology(folder: Path, args: argparse.Namespace) -> PairTopology:
    """The pair's limits."""
    return PairTopology(
        model_path=str(folder),
        device="cpu",
        dtype="float32",
        engine=EngineOptions(
            max_num_seqs=args.rows,
            max_context=MAX_CONTEXT,
            max_queued_requests=args.waiting,
            prefix_cache_mib=CACHE_MIB,
            prefill_chunk=PIECE,
        ),
        cpus_per_tower=1.0,
        gpus_per_tower=0.0,
        num_threads=1,
    )


async def soak(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one run."""
    phases = Phases()
    towers = Soak(topology(folder, args), phases)
    await towers.start()
    started = time.monotonic()
    readings = await rounds(towers, args)
    seconds = time.monotonic() - started
    stats = await towers.stats()
    cache = towers.engine.cache
    assert cache is not None
    cache.clear()
    left = await towers.left(cached_pages=False)
    await towers.close()
    return {
        "machine": machine(threads=2),
        "shape": {
            "hidden": SHAPE.hidden_size,
            "pattern": SHAPE.layer_pattern,
            "dtype": "float32",
            "rows": args.rows,
            "waiting": args.waiting,
            "in_flight": args.in_flight,
        },
        "requests": args.requests,
        "seconds": round(seconds, 1),
        "outcomes": dict(towers.outcomes),
        "cancels_by_phase": dict(phases.cancels),
        "refused": towers.refused,
        "rows_per_pass": {
            side: round(counters["pass_rows"] / counters["passes"], 2)
            for side, counters in stats.items()
        },
        "prefix_cache": {name: stats["context"][f"cache_{name}"] for name in ("hits", "misses")},
        "readings": readings,
        "left": left,
        "checked": await asyncio.to_thread(compared, folder, towers.outputs),
    }


async def rounds(towers: Soak, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Sends all requests, ROUND at a time; returns a reading after each round."""
    maker = RequestMaker(SHAPE.vocab_size, EOS, args.seed)
    readings = []
    for start in range(0, args.requests, ROUND):
        count = min(ROUND, args.requests - start)
        await towers.run(maker.requests(count), args.in_flight)
        readings.append(await reading(towers, start + count))
    return readings


def held(stats: dict[str, dict[str, float]], cached_pages: bool) -> dict[str, float]:
    """The counters that are not zero though they should be. With `cached_pages` the context tower
    may use pages, for the prefix cache."""
    return {
        f"{side}.{name}": stats[side][name]
        for side in stats
        for name in GONE
        if stats[side].get(name) and not (cached_pages and (side, name) == CACHED)
    }


async def reading(towers: Soak, requests: int) -> dict[str, Any]:
    """Counters that are left and the process's memory after so many requests."""
    left = await towers.left(cached_pages=True)
    context = (await towers.stats())["context"]
    gc.collect()
    return {
        "requests": requests,
        "left": left,
        "cache_entries": context["cache_entries"],
        "cache_pages": context["pages_used"],
        "tasks": len(asyncio.all_tasks()),
        "objects": len(gc.get_objects()),
        "rss_mib": round(rss_bytes() / 2**20, 1),
    }


def compared(folder: Path, outputs: Sequence[tuple[SoakRequest, list[int]]]) -> dict[str, Any]:
    """Compares outputs with those of each row alone; lists the requests whose outputs differ."""
    model = load_local(str(folder), 1, MAX_CONTEXT, prefill_chunk=PIECE).model
    different = []
    for request, got in outputs:
        [alone] = model.generate_requests([Request(request.prompt, request.params)])
        if alone.token_ids != got:
            different.append(f"{request}: got {got}, alone {alone.token_ids}")
    return {
        "outputs": len(outputs),
        "equal": len(outputs) - len(different),
        "by_mode": Counter(request.params.mode for request, _ in outputs),
        "different": different,
    }


def passed(figures: dict[str, Any], max_growth_mib: float) -> bool:
    """True if nothing is left, differs or has failed, and memory has not grown."""
    readings = figures["readings"]
    first, last = readings[0], readings[-1]
    # oneDNN keeps a kernel for each of the last thousand shapes, so memory settles late.
    settled = readings[len(readings) * 2 // 3]
    outcomes = figures["outcomes"]
    return (
        not figures["left"]
        and not any(each["left"] for each in readings)
        and outcomes.get("completed", 0) + outcomes.get("cancelled", 0) == figures["requests"]
        and not figures["checked"]["different"]
        and last["tasks"] <= first["tasks"]
        and last["objects"] <= first["objects"] * MAX_OBJECT_GROWTH
        and last["rss_mib"] - settled["rss_mib"] <= max_growth_mib
    )


def rss_bytes() -> int:
    """Resident memory of this process. Linux only."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _refused(task: asyncio.Task[list[int]]) -> bool:
    return not task.cancelled() and isinstance(task.exception(), QueueFullError)


if __name__ == "__main__":
    sys.exit(main())
