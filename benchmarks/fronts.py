"""CPU per block of the HTTP front beside the gRPC front, and what provisional blocks cost.

    python -m benchmarks.fronts [--rounds 7] [--streams 4] [--blocks 100]

One running service on the shipped model, one pair. CPU is what Serve's proxy and the router use
while the same streams of small blocks are read over one front and over the other, in turn; the
client's own is not counted. The cost of provisional blocks is the ratio of tokens/s with and
without them, streams at the default threshold. Figures are medians over rounds. Prints JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx

from benchmarks.demo import PROMPT
from benchmarks.figures import median
from benchmarks.machine import machine
from benchmarks.service import service_config
from twotower.client import AsyncClient
from twotower.deployments.server.server import LocalService

BLOCK = 4
# A pass a block: the service is what is measured, and not the towers.
SMALL = {"block_size": BLOCK, "confidence_threshold": 0.0, "ignore_eos": True}
# Titles of the processes that a front's bytes go through.
COUNTED = ("ray::ProxyActor", "ray::ServeReplica:twotower:Router")
Read = Callable[..., Awaitable[int]]


def main() -> None:
    """Parses the arguments, measures, prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=100)
    args = parser.parse_args()
    config = service_config(None, args.streams)
    with LocalService(config) as service:
        found = asyncio.run(measure(service.address, config.http_port, args))
    print(json.dumps(found, indent=2))


async def measure(target: str, http_port: int, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one run."""
    base = f"http://127.0.0.1:{http_port}"
    limits = httpx.Limits(max_connections=None)
    async with (
        AsyncClient(target) as grpc_client,
        httpx.AsyncClient(base_url=base, timeout=None, limits=limits) as http_client,
    ):

        async def over_grpc(**params: Any) -> int:
            return await read_grpc(grpc_client, **params)

        async def over_http(**params: Any) -> int:
            return await read_http(http_client, **params)

        small = {**SMALL, "max_tokens": BLOCK * args.blocks}
        plain = {"max_tokens": 96, "ignore_eos": True}
        fronts, drafts = [], []
        for _ in range(args.rounds + 1):
            fronts.append(
                [await cpu_per_block(read, args, small) for read in (over_grpc, over_http)]
            )
            speeds = []
            for provisional in (False, True):
                speeds.append(await speed(over_grpc, args, {**plain, "provisional": provisional}))
            drafts.append(speeds)
    # The first round warms up.
    fronts, drafts = fronts[1:], drafts[1:]
    return {
        "machine": machine(2),
        "streams": args.streams,
        "grpc_cpu_ms_per_block": median(grpc for grpc, _ in fronts),
        "http_cpu_ms_per_block": median(http for _, http in fronts),
        "http_over_grpc": median(http / grpc for grpc, http in fronts),
        "tokens_per_s": median(off for off, _ in drafts),
        "provisional_over_plain": median(on / off for off, on in drafts),
    }


async def cpu_per_block(read: Read, args: argparse.Namespace, params: dict[str, Any]) -> float:
    """Milliseconds of CPU of proxy and router per block of concurrent streams."""
    before = cpu_seconds()
    blocks = await asyncio.gather(*(read(**params) for _ in range(args.streams)))
    return 1e3 * (cpu_seconds() - before) / sum(blocks)


async def speed(read: Read, args: argparse.Namespace, params: dict[str, Any]) -> float:
    """Tokens/s of concurrent streams."""
    begin = time.perf_counter()
    await asyncio.gather(*(read(**params) for _ in range(args.streams)))
    return float(args.streams * params["max_tokens"] / (time.perf_counter() - begin))


async def read_grpc(client: AsyncClient, **params: Any) -> int:
    """Reads a completion; returns the number of its blocks."""
    stream = client.generate(PROMPT, **params)
    return sum([1 async for block in stream if hasattr(block, "text")])


async def read_http(client: httpx.AsyncClient, **params: Any) -> int:
    """As `read_grpc`, over server-sent events."""
    body = {"prompt": PROMPT, "stream": True, **params}
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        events = [line async for line in answer.aiter_lines() if line.startswith("data: {")]
    return len(events)


def cpu_seconds() -> float:
    """CPU time of proxies and routers so far."""
    ticks = sum(_ticks(folder) for folder in Path("/proc").iterdir() if folder.name.isdecimal())
    return ticks / os.sysconf("SC_CLK_TCK")


def _ticks(folder: Path) -> int:
    try:
        title = (folder / "cmdline").read_bytes().decode(errors="replace")
        if not title.startswith(COUNTED):
            return 0
        fields = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])


if __name__ == "__main__":
    main()
