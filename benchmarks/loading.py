"""What loading a model takes, in fresh processes, with its file in the page cache.

    python -m benchmarks.loading                   # random weights, 570 M parameters in fp32
    python -m benchmarks.loading --model DIR --dtype bfloat16 --threads 2 --self-test

Prints medians over the repeats: seconds of loading and the seconds that its threads spent in each
part of it, peak memory, seconds from a process's start to its first tokens, and the seconds in
which one thread reads every byte of the mapped files, which is the floor. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.random_checkpoint import MEDIUM, write_random_checkpoint

CONFIG = replace(
    MEDIUM, hidden_size=768, n_routed_experts=64, vocab_size=47104, num_attention_heads=12
)
Figures = dict[str, float]


def main() -> None:
    """Parses the arguments, measures, prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="a checkpoint folder; else random weights")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--self-test", action="store_true", help="run recorded passes first")
    parser.add_argument("--begun", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.begun is not None:
        print(json.dumps(one_load(args)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        if args.model is None:
            args.model = Path(scratch)
            # In another process, whose memory is gone before the first measurement.
            writer = get_context("spawn").Process(
                target=write_random_checkpoint, args=(args.model, CONFIG)
            )
            writer.start()
            writer.join()
        read_all(args.model)
        floor = median(read_all(args.model) for _ in range(args.repeats))
        runs = [_in_a_process(args) for _ in range(args.repeats)]
    figures = {name: round(median(run[name] for run in runs), 3) for name in runs[0]}
    print(json.dumps(figures | {"read_mapped_s": round(floor, 3)}, indent=2))


def _in_a_process(args: argparse.Namespace) -> Figures:
    """The figures of one load in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.loading", "--model", str(args.model)]
    command += ["--dtype", args.dtype, "--threads", str(args.threads)]
    command += ["--self-test"] * args.self_test + ["--begun", str(time.time())]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=600)
    figures: Figures = json.loads(done.stdout)
    return figures


def one_load(args: argparse.Namespace) -> Figures:
    """Loads the model in this process, which began at `args.begun` of the system's clock, and
    generates one block."""
    import torch

    from twotower import TwoTower

    torch.set_num_threads(args.threads)
    spent = time_parts()
    begun = time.perf_counter()
    model = TwoTower.from_pretrained(args.model, dtype=args.dtype, self_test=args.self_test or None)
    loaded = time.perf_counter()
    model.generate([[1, 2, 3]], max_tokens=16, steps_per_block=1)
    return {
        "load_s": loaded - begun,
        **spent,
        "first_block_s": time.perf_counter() - loaded,
        "process_start_to_first_block_s": time.time() - args.begun,
        "peak_rss_gb": _peak_bytes() / 1e9,
    }


def time_parts() -> Figures:
    """Makes the parts of loading add the time that they take, in all threads, to the result."""
    from twotower import api
    from twotower.towers.checkpoint import tower_loader
    from twotower.towers.checkpoint.checkpoint import Checkpoint

    spent: Figures = defaultdict(float)
    for owner, name, part in (
        (Checkpoint, "_check", "checking_s"),
        (Checkpoint, "read", "reading_s"),
        (Checkpoint, "lying", "reading_s"),
        (tower_loader, "pack", "packing_s"),
        (tower_loader, "try_single_row", "trials_s"),
        (api, "prove_device", "self_test_s"),
    ):
        spent.setdefault(part, 0.0)
        setattr(owner, name, _timed(getattr(owner, name), part, spent))
    return spent


def _timed(work: Callable[..., Any], part: str, spent: Figures) -> Callable[..., Any]:
    adding = threading.Lock()

    def timed(*given: Any, **named: Any) -> Any:
        begun = time.perf_counter()
        try:
            return work(*given, **named)
        finally:
            with adding:
                spent[part] += time.perf_counter() - begun

    return timed


def read_all(folder: Path) -> float:
    """Seconds in which this thread reads every byte of a checkpoint's mapped files."""
    import torch
    from safetensors import safe_open

    torch.set_num_threads(1)
    begun = time.perf_counter()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 -- no mapping
                file.get_tensor(name).flatten().view(torch.uint8).view(torch.int32).sum()
    return time.perf_counter() - begun


def _peak_bytes() -> int:
    """The largest resident memory that this process has had."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM line")


if __name__ == "__main__":
    main()
