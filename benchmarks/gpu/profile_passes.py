"""Kernels of the engines' passes and the gaps between them:
`python -m benchmarks.gpu.profile_passes --rows 1 16 --out FILE`.

Runs rows through both engines under the profiler, steps replayed as graphs, and lists for each
kernel its launches and time, how many launches a pass has, and the part of the time in which the
device did nothing: inside passes (launch gaps) and between them (the host).
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from twotower.bench.decode import Run
from twotower.bench.options import defaults_for
from twotower.bench.timing import synchronize
from twotower.bench.workbench import Workbench
from twotower.planner.schedules import shuffled_rows

Entry = dict[str, Any]
# A longer pause is the host's: gaps between launches of a graph last a microsecond or two.
_PAUSE_US = 15.0
_BLOCKS = 2


@dataclass(frozen=True)
class Launch:
    """A kernel that ran on the device; begin and end in microseconds."""

    name: str
    begin: float
    end: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="30b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--context", type=int)
    parser.add_argument("--experts", default="full")
    parser.add_argument("--expert-products", default="widened")
    parser.add_argument("--trace", type=Path, help="folder for whole traces (Chrome's format)")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    options = defaults_for(args.preset, args.device)
    options = replace(
        options,
        batches=tuple(args.rows),
        long_rows=1,
        experts=args.experts,
        expert_products=args.expert_products,
        context=args.context or options.context,
    )
    bench = Workbench(options)
    lines: list[Entry] = []
    for rows in args.rows:
        bench.steer(rows)
        for mode in ("mask_diffusion", "ar"):
            entry = _profiled(bench, mode, rows, args.trace)
            lines.append(entry)
            print(json.dumps({key: value for key, value in entry.items() if key != "kernels"}))
            args.out.write_text(json.dumps({"profiles": lines}, indent=1), encoding="utf-8")
    bench.close()


def _profiled(bench: Workbench, mode: Any, rows: int, trace: Path | None) -> Entry:
    options = bench.options
    schedules = shuffled_rows("headline", rows, options.seed, in_step=True)
    run = Run(mode, rows, options.context, _BLOCKS, 1, options.block, schedules)
    bench.pair.warm_up(options.block, rows)
    bench.pair.decode(run)
    on_cuda = bench.device.type == "cuda"
    kind = ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU
    passes = _passes(bench)
    with profile(activities=[kind]) as profiler:
        decoded = bench.pair.decode(run)
        synchronize(bench.device)
    done = {name: after - passes[name] for name, after in _passes(bench).items()}
    if trace is not None:
        trace.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace / f"{mode}-{rows}.json.gz"))
    launches = _launches(profiler, on_cuda)
    ms = {
        "denoise_ms": 1e3 * decoded.denoiser.seconds_a_pass,
        "context_ms": 1e3 * decoded.context.seconds_a_pass,
    }
    return {"mode": mode, "rows": rows, "passes": done, **ms, **summary(launches)}


def _passes(bench: Workbench) -> dict[str, float]:
    pair = bench.pair
    return {
        "denoise": pair.denoiser.stats().passes,
        "context": pair.context.stats().passes,
    }


def _launches(profiler: Any, on_cuda: bool) -> list[Launch]:
    """Kernels of the device by their begin; on a CPU its operators instead."""
    wanted = "CUDA" if on_cuda else "CPU"
    found = [
        Launch(event.name(), event.start_ns() / 1e3, event.end_ns() / 1e3)
        for event in profiler.profiler.kineto_results.events()
        if wanted in str(event.device_type())
    ]
    return sorted(found, key=lambda launch: launch.begin)


def summary(launches: Sequence[Launch]) -> Entry:
    """Busy time, gaps and kernels of launches in order of their begin."""
    if not launches:
        return {"launches": 0}
    busy, short, long, pauses = 0.0, 0.0, 0.0, 0
    reached = launches[0].begin
    for launch in launches:
        gap = launch.begin - reached
        if gap > _PAUSE_US:
            long, pauses = long + gap, pauses + 1
        else:
            short += max(0.0, gap)
        busy += max(0.0, launch.end - max(reached, launch.begin))
        reached = max(reached, launch.end)
    total = reached - launches[0].begin
    return {
        "launches": len(launches),
        "total_ms": total / 1e3,
        "busy_share": busy / total if total else 0.0,
        "launch_gap_share": short / total if total else 0.0,
        "pause_share": long / total if total else 0.0,
        "pauses": pauses,
        "kernels": by_kernel(launches),
    }


def by_kernel(launches: Iterable[Launch]) -> list[Entry]:
    """Launches, time and median time of each kernel, the longest in all first."""
    times: dict[str, list[float]] = defaultdict(list)
    for launch in launches:
        times[_short(launch.name)].append(launch.end - launch.begin)
    lines = [
        {
            "kernel": name,
            "launches": len(spent),
            "ms": round(sum(spent) / 1e3, 4),
            "median_us": round(sorted(spent)[len(spent) // 2], 2),
        }
        for name, spent in times.items()
    ]
    return sorted(lines, key=lambda line: -float(line["ms"]))


def _short(name: str) -> str:
    """A kernel's name without template arguments and signature."""
    return re.sub(r"<.*|\(.*", "", name.removeprefix("void ")).strip()[:90]


if __name__ == "__main__":
    main()
