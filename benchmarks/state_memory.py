"""Anonymous memory while a tower loads, and while it decodes.

    python -m benchmarks.state_memory                # a random tower of at least 1 GB
    python -m benchmarks.state_memory --model DIR

Loading: the growth of anonymous memory at its peak, against the bytes of the tower's tensors.
Decoding: the same at two context lengths, against the bytes of K/V. Linux only.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks.random_checkpoint import MEDIUM, write_random_checkpoint
from twotower.towers.checkpoint.checkpoint import tensor_shapes
from twotower.towers.checkpoint.weights import load_context_tower, load_denoiser_tower
from twotower.towers.config.model_config import TwoTowerConfig
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.model.denoiser_tower import DenoiserTower
from twotower.towers.state.tensors import page_bytes
from twotower.towers.state.update import StateUpdate, UpdatePlan

T = TypeVar("T")
LARGE = replace(MEDIUM, n_routed_experts=128, hidden_size=640, vocab_size=32768)


def main() -> None:
    """Parses the arguments, measures, prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model", type=Path, help="a checkpoint folder; random weights if left out"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model or Path(scratch)
        if args.model is None:
            # In another process: memory freed in this process would hide the loader's.
            writer = get_context("spawn").Process(
                target=write_random_checkpoint, args=(folder, LARGE)
            )
            writer.start()
            writer.join()
        config = TwoTowerConfig.from_file(folder / "config.json")
        size = tower_bytes(config)
        context, loading = peak_over_start(lambda: load_context_tower(folder))
        denoiser = load_denoiser_tower(folder)
        decode_growth(context, denoiser, 64)
        figures = {
            "tower_bytes": size,
            "load_peak_bytes": loading,
            "load_peak_over_tensors": round(loading / size, 3),
            "decode": {str(n): decode_growth(context, denoiser, n) for n in (1024, 8192)},
        }
    print(json.dumps(figures, indent=2))


def tower_bytes(config: TwoTowerConfig) -> int:
    """Bytes of the context tower and its head in fp32; the router's gate is kept in fp64."""
    total = 0
    for name, shape in tensor_shapes(config).items():
        if name.startswith("context_"):
            width = 8 if name.endswith("gate.weight") else 4
            total += width * torch.Size(shape).numel()
    return total


def decode_growth(context: ContextTower, denoiser: DenoiserTower, length: int) -> dict[str, int]:
    """Growth of anonymous memory at its peak during a denoiser pass and an extension after `length`
    tokens of context, and the bytes of the state's pages."""
    state = context.new_state(length + 16)
    # Zero K/V take as long as real ones; reading 8 K tokens would take minutes.
    plan = UpdatePlan("snapshot", 0, length)
    zeros = {
        name: torch.zeros(()).expand(size) for name, size in plan.shapes(context.config).items()
    }
    state.apply(StateUpdate(plan, zeros))

    def block() -> None:
        denoiser.forward([[3] * 16], [1.0], [state])
        context.forward([[5] * 16], [state])

    _, peak = peak_over_start(block)
    pages = len(state.pages) * page_bytes(context.config, context.dtype)
    return {"peak_bytes": peak, "kv_bytes": pages}


def peak_over_start(work: Callable[[], T]) -> tuple[T, int]:
    """Runs `work`; returns its result and the growth of anonymous memory at its peak, in bytes."""
    start = anonymous_bytes()
    peak = start
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous_bytes())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = work()
    finally:
        done.set()
        watcher.join()
    return result, max(peak, anonymous_bytes()) - start


def anonymous_bytes(process: int | None = None) -> int:
    """Bytes of resident anonymous memory of a process (None: this process)."""
    status = Path(f"/proc/{process or 'self'}/status")
    for line in status.read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{status} has no RssAnon line")


if __name__ == "__main__":
    main()
