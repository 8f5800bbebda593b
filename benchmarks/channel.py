"""Bytes of a committed block between the towers, and how fast the state channel carries them.

    python -m benchmarks.channel
    python -m benchmarks.channel --rows 16 --rounds 15
    python -m benchmarks.channel --transport nccl

At the shapes of the 30B model in bf16: the bytes of one row's block as a delta beside those of its
whole state, and for each transport the throughput of the channel, several rows at once, beside a
bare transfer between the same two processes: 1 MiB messages over a gRPC stream with the same
options, 1 MiB tensors through a process group. Bare and channel take turns; the ratio is that of
their medians. NCCL wants two GPUs, cuda:0 receives; its bare transfer is NCCL at its best, 8 MiB
tensors one after the other, with a wait after the last only. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import grpc.aio
import torch
from torch import Tensor

from benchmarks.machine import machine
from twotower.cluster.channel import process_group
from twotower.cluster.channel.framing import CHUNK_BYTES
from twotower.cluster.channel.grpc import CPU, OPTIONS, GrpcStateLink, LinkSpec
from twotower.cluster.channel.nccl import RECEIVER, SENDER, TAG, settle
from twotower.cluster.channel.process_group import GROUP_FRAME_BYTES
from twotower.cluster.channel.receiver import StateReceiver
from twotower.cluster.topology import Transport, max_update_bytes
from twotower.planner.shapes import LARGE
from twotower.towers.state.update import StateUpdate, UpdateBuilder, UpdateKind, UpdatePlan

TOKEN = "benchmark"
BARE_METHOD = "/benchmark.Bare/Carry"
BARE_MESSAGES = 256
# As many bytes as the rows' updates: one message over and over would come from the CPU's cache.
BARE_SOURCES = 32
BARE_TIMEOUT_S = 60.0
LONGEST = 1 << 17
TRANSPORTS: tuple[Transport, ...] = ("grpc", "gloo", "nccl")
ON_HOST = ["grpc", "gloo"]
HOST = "127.0.0.1"
# Objects that have to outlive the call that started them.
KEPT: list[object] = []
Round = Callable[[], Awaitable[int]]


def main() -> None:
    """Parses the arguments, measures, prints JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 102400])
    parser.add_argument("--rows", type=int, default=8, help="rows in flight")
    parser.add_argument("--updates", type=int, default=8, help="updates of a row per round")
    parser.add_argument("--rounds", type=int, default=11, help="of each kind")
    parser.add_argument("--transport", choices=TRANSPORTS, nargs="+", default=ON_HOST)
    parser.add_argument("--receive", choices=TRANSPORTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.receive:
        asyncio.run(serve(args.receive))
        return
    if "nccl" in args.transport and torch.cuda.device_count() < 2:
        parser.error(f"--transport nccl: got {torch.cuda.device_count()} GPUs, expected 2")
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    result: dict[str, Any] = {
        "machine": machine(threads=1) | {"gpus": gpus},
        "block": args.block,
        "rows": args.rows,
        "bytes": {n: block_bytes(n, args.block) for n in args.contexts},
    }
    for transport in args.transport:
        result[transport] = asyncio.run(throughput(transport, args))
    print(json.dumps(result, indent=2))


def block_bytes(context: int, block: int) -> dict[str, float]:
    """MB of the delta and of the whole state after one block on `context` tokens."""
    kinds: dict[str, UpdateKind] = {"delta_mb": "delta", "whole_state_mb": "snapshot"}
    return {name: built(kind, context, block).num_bytes / 1e6 for name, kind in kinds.items()}


def device_of(transport: Transport, *, sender: bool) -> torch.device:
    """The device on which one side has its bytes."""
    return torch.device("cuda", int(sender)) if transport == "nccl" else CPU


def built(kind: UpdateKind, context: int, block: int, device: torch.device = CPU) -> StateUpdate:
    """An update of random values."""
    plan = UpdatePlan(kind, context, context + block)
    builder = UpdateBuilder(LARGE, plan, device, torch.bfloat16)
    for name, tensor in builder.layout.items():
        for layer in range(len(tensor)):
            builder.put(name, layer, torch.randn(tensor.shape[1:]))
    return builder.update()


async def throughput(transport: Transport, args: argparse.Namespace) -> dict[str, float]:
    """MB/s of the bare transfer and of the channel, medians, and their ratio."""
    device = device_of(transport, sender=True)
    with receiving_process(transport) as (address, bare_port, start_round):
        if transport == "grpc":
            bare, close_bare = await bare_grpc(bare_port)
        else:
            bare, close_bare = await bare_group(transport, bare_port, start_round)
        spec = LinkSpec(address, TOKEN, 1, transport)
        link = GrpcStateLink(spec, LARGE, torch.bfloat16, {}, device=device)
        update = built("delta", 0, args.block, device)
        channel = channel_round(link, update, args.rows, args.updates)
        rates: dict[str, list[float]] = {"bare": [], "channel": []}
        for number in range(args.rounds + 1):
            for name, run in (("bare", bare), ("channel", channel)):
                begin = time.perf_counter()
                num_bytes = await run()
                # The first round connects and warms up.
                if number:
                    rates[name].append(num_bytes / (time.perf_counter() - begin) / 1e6)
        await link.close()
        await close_bare()
    medians = {f"{name}_mb_per_s": statistics.median(values) for name, values in rates.items()}
    return {**medians, "ratio": medians["channel_mb_per_s"] / medians["bare_mb_per_s"]}


def channel_round(link: GrpcStateLink, update: StateUpdate, rows: int, updates: int) -> Round:
    """Sends so many deltas of so many rows; a thread puts the layers' shares, as an engine does."""
    thread = ThreadPoolExecutor(1, "engine")
    parts, count = list(update.parts()), update.plan.count
    places = {f"row-{number}": 0 for number in range(rows)}
    for row_id in places:
        link.open(row_id)

    def fill(put: Callable[[str, int, Tensor], None]) -> None:
        for part in parts:
            put(*part)

    async def row(row_id: str) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(updates):
            start = places[row_id]
            places[row_id] = start + count
            # The link itself reads nothing of the state.
            state: Any = None
            writer = link.begin(row_id, state, UpdatePlan("delta", start, start + count))
            await loop.run_in_executor(thread, fill, writer.put)
            await writer.finish()

    async def run() -> int:
        await asyncio.gather(*map(row, places))
        return rows * updates * update.num_bytes

    return run


async def bare_grpc(port: int) -> tuple[Round, Callable[[], Awaitable[None]]]:
    """1 MiB messages over one stream, answered once at the end."""
    channel = grpc.aio.insecure_channel(f"{HOST}:{port}", options=OPTIONS)
    carry: Any = channel.stream_stream(BARE_METHOD, None, None)
    messages = [os.urandom(CHUNK_BYTES) for _ in range(BARE_SOURCES)]

    async def run() -> int:
        call = carry()
        for number in range(BARE_MESSAGES):
            await call.write(messages[number % BARE_SOURCES])
        await call.done_writing()
        return int(await call.read())

    return run, channel.close


async def bare_group(
    transport: Transport, port: int, start_round: Callable[[], None]
) -> tuple[Round, Callable[[], Awaitable[None]]]:
    """Tensors through a process group, answered by one byte."""
    device = device_of(transport, sender=True)
    end = await process_group.join(transport, HOST, port, device, 30.0)
    group, size = end.member.group, bare_bytes(transport)
    tensors = torch.randint(256, (BARE_SOURCES, size), dtype=torch.uint8, device=device)
    answer = torch.zeros(1, dtype=torch.uint8, device=device)

    def transfer() -> int:
        start_round()
        for number in range(BARE_MESSAGES):
            sending = group.send([tensors[number % BARE_SOURCES]], RECEIVER, TAG)
            # NCCL's are queued on the GPU, in order; the answer comes after all of them.
            if transport == "gloo":
                sending.wait()
        settled(transport, group, group.recv([answer], RECEIVER, TAG))
        return BARE_MESSAGES * size

    async def run() -> int:
        return await asyncio.to_thread(transfer)

    async def close() -> None:
        end.close()

    return run, close


def bare_bytes(transport: Transport) -> int:
    """Bytes of one message of the bare transfer."""
    return GROUP_FRAME_BYTES if transport == "nccl" else CHUNK_BYTES


def settled(transport: Transport, group: Any, work: Any) -> None:
    """Waits until one transfer has ended."""
    if transport == "nccl":
        settle(work, group.abort, BARE_TIMEOUT_S)
    else:
        work.wait()


@contextlib.contextmanager
def receiving_process(transport: Transport) -> Iterator[tuple[str, int, Callable[[], None]]]:
    """Starts a process that receives: yields the channel's address, the bare transfer's port, and
    a function that starts a round of the bare transfer."""
    command = [sys.executable, "-m", "benchmarks.channel", "--receive", transport]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        start = process.stdin

        def start_round() -> None:
            start.write("\n")
            start.flush()

        try:
            address, bare_port = process.stdout.readline().split()
            yield address, int(bare_port), start_round
        finally:
            process.terminate()


async def serve(transport: Transport) -> None:
    """Runs the receiving process: a StateReceiver that follows the rows, and the other end of the
    bare transfer."""

    def apply(row_id: str, update: StateUpdate) -> None:
        """Does nothing with the update: the bare transfer does nothing with its bytes either."""

    def follow(tensors: Mapping[str, Tensor]) -> None:
        """Does nothing: there is no replay in this benchmark."""

    limit = max_update_bytes(LARGE, LONGEST)
    device = device_of(transport, sender=False)
    receiver = StateReceiver(apply, follow, TOKEN, limit, transport=transport, device=device)
    for number in range(64):
        receiver.open(f"row-{number}")
    address = await receiver.start(HOST)
    bare_port = await (serve_bare_grpc() if transport == "grpc" else serve_bare_group(transport))
    print(address, bare_port, flush=True)
    await asyncio.Event().wait()


async def serve_bare_grpc() -> int:
    """Counts the bytes of each stream; returns the port."""

    async def carry(messages: AsyncIterator[bytes], _: Any) -> AsyncIterator[bytes]:
        total = 0
        async for message in messages:
            total += len(message)
        yield str(total).encode()

    server = grpc.aio.server(options=OPTIONS)
    service, method = BARE_METHOD.strip("/").split("/")
    handler = grpc.stream_stream_rpc_method_handler(carry)
    handlers = grpc.method_handlers_generic_handler(service, {method: handler})
    server.add_generic_rpc_handlers((handlers,))
    port = server.add_insecure_port(f"{HOST}:0")
    await server.start()
    KEPT.append(server)
    return port


async def serve_bare_group(transport: Transport) -> int:
    """Receives the tensors in one thread until the peer is gone; returns the store's port."""
    rendezvous = process_group.Rendezvous(HOST)
    device = device_of(transport, sender=False)

    def transfer(group: Any) -> None:
        tensor = torch.empty(bare_bytes(transport), dtype=torch.uint8, device=device)
        # An error tells that the peer has gone.
        with contextlib.suppress(RuntimeError):
            # Not before it is asked: NCCL's kernels would spin beside the channel's round.
            while sys.stdin.readline():
                for _ in range(BARE_MESSAGES):
                    receiving = group.recv([tensor], SENDER, TAG)
                    if transport == "gloo":
                        receiving.wait()
                settled(transport, group, group.send([tensor[:1]], SENDER, TAG))

    async def run() -> None:
        end = await rendezvous.accept(transport, device, 30.0)
        threading.Thread(target=transfer, args=(end.member.group,), daemon=True).start()

    KEPT.append(asyncio.create_task(run()))
    return rendezvous.port


if __name__ == "__main__":
    main()
