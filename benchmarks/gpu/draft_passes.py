"""Passes of the context tower over drafts, by rows and length:
`python -m benchmarks.gpu.draft_passes --rows 1 16 64 --out FILE`.

Times what a round of `verified` takes: single steps, drafts of 2, 4, 8 and 16 tokens (the first of
them is the last committed one), and rows of all these lengths in one pass. Random towers accept
next to nothing, so tokens a second are given as if a share of each draft were accepted. Says too
how long the capture of all that takes, and how much memory it leaves.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from twotower.bench.options import defaults_for
from twotower.bench.timing import median_seconds, synchronize
from twotower.bench.workbench import Workbench
from twotower.towers.decoding.draft_policy import PASS_LENGTHS
from twotower.towers.decoding.sampling import Draw, Sampler
from twotower.towers.engine.block_log import BlockLog
from twotower.towers.engine.context_drafts import ContextDrafts
from twotower.towers.engine.context_pass import ContextPass
from twotower.towers.engine.context_steps import ContextSteps
from twotower.towers.engine.context_work import ContextWork
from twotower.towers.engine.cuda_graph import GraphMemory
from twotower.towers.state.context_state import ContextState

Entry = dict[str, Any]
_LENGTHS = (1, *PASS_LENGTHS)
_REPEATS = {"cuda": 20, "cpu": 2}
_ACCEPTED = (0.25, 0.5, 1.0)
_GREEDY = Sampler(0.0, None, None, None, key=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="30b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--context", type=int)
    parser.add_argument("--experts", default="full")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    options = defaults_for(args.preset, args.device)
    options = replace(
        options,
        batches=tuple(args.rows),
        long_rows=1,
        experts=args.experts,
        context=args.context or options.context,
    )
    bench = Workbench(options)
    memory, log = GraphMemory(bench.device), BlockLog(bench.context)
    steps = ContextSteps(bench.context, memory)
    drafts = ContextDrafts(bench.context, memory, log)
    captured = _captured(bench, steps, drafts, max(args.rows))
    run = ContextPass(bench.context, steps, drafts=drafts)
    lines: list[Entry] = []
    for rows in args.rows:
        bench.steer(rows)
        lines += _timed(bench, run, rows)
        print(json.dumps(lines[-1]), flush=True)
        found = {"captured": captured, "passes": lines}
        args.out.write_text(json.dumps(found, indent=1), encoding="utf-8")
    bench.close()


def _captured(bench: Workbench, steps: ContextSteps, drafts: ContextDrafts, rows: int) -> Entry:
    """Seconds and bytes that the graphs of steps and of drafts take."""
    found: Entry = {"rows": rows}
    for name, programs in (("steps", steps), ("drafts", drafts)):
        free, begun = _free_bytes(bench.device), time.monotonic()
        programs.warm_up(bench.pool, rows)
        synchronize(bench.device)
        found[f"{name}_s"] = round(time.monotonic() - begun, 2)
        found[f"{name}_mb"] = round((free - _free_bytes(bench.device)) / 1e6, 1)
    return found


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def _timed(bench: Workbench, run: ContextPass, rows: int) -> list[Entry]:
    """Times of passes over rows that all have drafts of one length, and of rows of all lengths."""
    shapes = [(str(length), [length] * rows) for length in _LENGTHS]
    if rows > 1:
        mixed = [_LENGTHS[row % len(_LENGTHS)] for row in range(rows)]
        shapes.append(("mixed", mixed))
    context, lines = bench.options.context, []
    with bench.pool.rows_at(context, rows, max(_LENGTHS)) as states:
        for name, lengths in shapes:

            def work(lengths: Sequence[int] = lengths) -> None:
                run.run([_work(*pair) for pair in zip(states, lengths, strict=True)])
                for state in states:
                    # Every pass begins where the first did.
                    state.position = state.length = context

            seconds = median_seconds(work, bench.device, _REPEATS[bench.device.type])
            tokens = {
                f"tokens_per_s_at_{share}": sum(1 + share * (length - 1) for length in lengths)
                / seconds
                for share in _ACCEPTED
            }
            lines.append({"rows": rows, "length": name, "ms": 1e3 * seconds, **tokens})
    return lines


def _work(state: ContextState, length: int) -> ContextWork:
    draws = Draw(_GREEDY, range(state.position + 1, state.position + 1 + length))
    return ContextWork(state, [0] * length, length == 1, draws, accepts=length > 1)


if __name__ == "__main__":
    main()
