"""Measures single passes: against plain PyTorch, by operator, and over long contexts."""

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
# Context passes advance their rows: room in tokens for all repeats.
_ROOM = 128
_LONG_BLOCKS = 2
# Calls before a capture: compilation, and libraries' setup at first use.
_BEFORE_CAPTURE = 3


def measure_baseline(bench: Workbench, kind: PassKind, rows: int, ours: float) -> Entry:
    """Times a pass in plain PyTorch: eager, compiled, and compiled as a CUDA graph.

    `ours` are the engine's seconds for the same pass, which are compared with the better of eager
    and compiled. A form that cannot be built is listed with its error.
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
        **{f"{name}_ms": 1e3 * spent for name, spent in seconds.items()},
        "errors": errors,
        "ours_ms": 1e3 * ours,
        "speedup": best / ours,
    }


def _time_plain(probe: Probe, bench: Workbench) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of each form that could be built, and the errors of the others."""
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
    """Times the operators of a pass, with the head over all positions."""
    bench.steer(rows)
    times = _operators(bench, kind, rows, bench.options.context)
    return {
        "kind": kind,
        "rows": rows,
        "context": bench.options.context,
        "unique_experts": bench.unique(kind, rows),
        "operators": [_operator_entry(time) for time in times],
    }


def measure_attention(bench: Workbench, rows: int) -> Entry:
    """Times block attention over growing contexts, and a whole pass at the longest."""
    bench.steer(rows)
    longest = bench.options.long_context
    contexts = [longest >> shift for shift in (3, 2, 1, 0)]
    lines = []
    for context in contexts:
        times = _operators(bench, "denoise", rows, context)
        attention = sum(time.seconds for time in times if time.name == "attention")
        lines.append(
            {
                "context": context,
                "attention_ms": 1e3 * attention,
                "operators_ms": 1e3 * sum(time.seconds for time in times),
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
    """Seconds of the engine's denoiser pass over all rows."""
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


def _operator_entry(time: OperatorTime) -> Entry:
    floor = time.floor_seconds
    return {
        "name": time.name,
        "calls": time.calls,
        "us": 1e6 * time.seconds,
        "floor_us": None if floor is None else 1e6 * floor,
        "share_of_floor": None if floor is None else floor / time.seconds,
    }


def _plain_call(probe: Probe, *, compiled: bool) -> Callable[[], object]:
    """A plain pass with the head over the same positions as the engine's pass: a denoiser's masked
    positions, all rows of an AR step."""
    plain = probe.plain(compiled=compiled)
    tokens, modulation = probe.tokens.to(probe.tower.device), probe.modulation()
    wanted = probe.wanted().to(tokens.device)
    return lambda: plain.predict(tokens, modulation, wanted)


def _graph(work: Callable[[], object]) -> Callable[[], object]:
    """The launches of `work` as one CUDA graph."""
    for _ in range(_BEFORE_CAPTURE):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()

    def replay() -> object:
        graph.replay()
        # Keeps `work` alive, which owns the tensors that the graph reads and writes.
        return work

    return replay
