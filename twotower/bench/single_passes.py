"""Passes on their own: against plain PyTorch, operator by operator, and over long contexts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from twotower.bench.decode import Run
from twotower.bench.operators import OperatorTime, measure_operators
from twotower.bench.probes import Probe
from twotower.bench.timing import median_seconds
from twotower.bench.workbench import Workbench
from twotower.planner.floors import PassKind
from twotower.planner.schedules import PROFILES, masked_share, shuffled_rows

Entry = dict[str, Any]
_REPEATS = 7
# Context passes move their rows on: room for every repeat.
_ROOM = 128
_LONG_BLOCKS = 2
# Compilation, and whatever libraries set up at first use.
_BEFORE_CAPTURE = 3


def measure_baseline(bench: Workbench, kind: PassKind, rows: int, ours: float) -> Entry:
    """One pass in plain PyTorch: eager, compiled, and the compiled one as a CUDA graph.

    `ours` is what the engine needs for the same pass, in seconds; the better of eager and compiled
    is what it is compared with. A form that cannot be built is named with its error.
    """
    bench.steer(rows)
    options = bench.options
    unique = bench.unique(kind, rows)
    with bench.pool.rows_at(options.context, rows, options.block) as states:
        probe = Probe.of(kind, bench.tower(kind), states, options.block)
        seconds, errors = _time_plain(probe, bench)
    best = min(seconds[name] for name in ("eager", "compiled") if name in seconds)
    return {
        "kind": kind,
        "rows": rows,
        "context": options.context,
        "unique_experts": unique,
        **{f"{name}_ms": 1e3 * own for name, own in seconds.items()},
        "errors": errors,
        "ours_ms": 1e3 * ours,
        "speedup": best / ours,
    }


def _time_plain(probe: Probe, bench: Workbench) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of each form that could be built, and why others could not."""
    forms: dict[str, Callable[[], Callable[[], object]]] = {
        "eager": lambda: _plain_call(probe, compiled=False)
    }
    if bench.options.compiled:
        forms["compiled"] = lambda: _plain_call(probe, compiled=True)
        if bench.device.type == "cuda":
            forms["compiled_graph"] = lambda: _graph(_plain_call(probe, compiled=True))
    seconds: dict[str, float] = {}
    errors: dict[str, str] = {}
    for name, build in forms.items():
        try:
            seconds[name] = median_seconds(build(), bench.device, _REPEATS)
        except RuntimeError as error:
            if name == "eager":
                raise
            # A compiler that gives up must not cost the eager figure.
            errors[name] = f"{type(error).__name__}: {error}"
    torch.compiler.reset()
    return seconds, errors


def measure_breakdown(bench: Workbench, kind: PassKind, rows: int) -> Entry:
    """A pass operator by operator, head over all positions."""
    bench.steer(rows)
    times = _operators(bench, kind, rows, bench.options.context)
    return {
        "kind": kind,
        "rows": rows,
        "context": bench.options.context,
        "unique_experts": bench.unique(kind, rows),
        "operators": [_operator_entry(own) for own in times],
    }


def measure_attention(bench: Workbench, rows: int) -> Entry:
    """Block attention over growing contexts, and its part of a whole pass at the longest."""
    bench.steer(rows)
    longest = bench.options.long_context
    contexts = [longest >> shift for shift in (3, 2, 1, 0)]
    lines = []
    for context in contexts:
        times = _operators(bench, "denoise", rows, context)
        attention = sum(own.seconds for own in times if own.name == "attention")
        lines.append(
            {
                "context": context,
                "attention_ms": 1e3 * attention,
                "operators_ms": 1e3 * sum(own.seconds for own in times),
            }
        )
    seconds = _engine_pass(bench, rows, longest)
    last = lines[-1]["attention_ms"] / 1e3
    floor = bench.floor("denoise", rows, longest, masked_share(PROFILES["headline"]))
    return {
        "rows": rows,
        "context": longest,
        "unique_experts": floor.unique,
        "contexts": lines,
        "pass_ms": 1e3 * seconds,
        "floor_ms": 1e3 * floor.seconds,
        "share_of_floor": floor.seconds / seconds,
        "share_of_pass": last / seconds,
        "growth": last * 1e3 / lines[0]["attention_ms"],
        "growth_of_context": contexts[-1] / contexts[0],
    }


def _engine_pass(bench: Workbench, rows: int, context: int) -> float:
    """Seconds of a denoiser pass of the engine, all rows in it."""
    block = bench.options.block
    schedules = shuffled_rows("headline", rows, bench.options.seed, in_step=True)
    run = Run("mask_diffusion", rows, context, _LONG_BLOCKS, 1, block, schedules)
    bench.pair.warm_up(block, rows)
    bench.pair.decode(run)
    return bench.pair.decode(run).denoiser.seconds_a_pass


def _operators(bench: Workbench, kind: PassKind, rows: int, context: int) -> list[OperatorTime]:
    block, tower = bench.options.block, bench.tower(kind)
    works = bench.floor(kind, rows, context).works
    with bench.pool.rows_at(context, rows, _ROOM) as states:
        probe = Probe.of(kind, tower, states, block)
        return measure_operators(probe.run, tower.weights, bench.device, works, bench.ceilings)


def _operator_entry(own: OperatorTime) -> Entry:
    floor = own.floor_seconds
    return {
        "name": own.name,
        "calls": own.calls,
        "us": 1e6 * own.seconds,
        "floor_us": None if floor is None else 1e6 * floor,
        "share_of_floor": None if floor is None else floor / own.seconds,
    }


def _plain_call(probe: Probe, *, compiled: bool) -> Callable[[], object]:
    """A plain pass with the head over the positions that the engine's has: the masked ones of a
    denoiser, every row's of an AR step."""
    plain = probe.plain(compiled=compiled)
    tokens, modulation = probe.tokens.to(probe.tower.device), probe.modulation()
    wanted = probe.wanted().to(tokens.device)
    return lambda: plain.predict(tokens, modulation, wanted)


def _graph(work: Callable[[], object]) -> Callable[[], object]:
    """The same launches as one CUDA graph."""
    for _ in range(_BEFORE_CAPTURE):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()

    def replay() -> object:
        graph.replay()
        # Kept: it owns the tensors that the graph reads and writes.
        return work

    return replay
