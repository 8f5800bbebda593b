"""Measures tokens/s and passes of the engines, with floors from the ceilings of the same run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from twotower.bench.decode import Decoded, Run, TowerPasses
from twotower.bench.workbench import WARM_BLOCKS, PassFloor, Workbench
from twotower.planner.floors import Ceilings, PassKind
from twotower.planner.schedules import (
    PROFILES,
    Schedule,
    masked_share,
    mean_steps,
    shuffled_rows,
)
from twotower.planner.speedup import PassSeconds, best_tokens_per_s, in_step_tokens_per_s

Entry = dict[str, Any]
_AR_BLOCKS = 3
_VERIFIED_BLOCKS = 8
_PRIMING = 2
_CONTEXT_PASS: dict[str, PassKind] = {
    "ar": "ar",
    "mask_diffusion": "extend",
    "verified": "verify",
}


@dataclass(frozen=True)
class Diffusion:
    """The profile that mask_diffusion replays; `in_step` if all rows commit alike in every step."""

    profile: str
    in_step: bool

    @property
    def sync(self) -> str:
        return "in step" if self.in_step else "continuous"

    def schedules(self, rows: int, seed: int) -> list[list[Schedule]]:
        return shuffled_rows(self.profile, rows, seed, in_step=self.in_step)


def measure_speed(
    bench: Workbench, rows: int, wanted: Sequence[Diffusion]
) -> tuple[list[Entry], list[Entry]]:
    """Runs AR and diffusion in turn, `repeats` times. Returns entries of the sections `decode` and
    `ratios`. The first run of each does not count: it compiles kernels.
    """
    bench.steer(rows)
    bench.pair.warm_up(bench.options.block, rows)
    runs = {diffusion: _diffusion_run(bench, rows, diffusion) for diffusion in wanted}
    ar = Run("ar", rows, bench.options.context, _AR_BLOCKS, 1, bench.options.block)
    bench.pair.decode(replace(ar, blocks=_PRIMING))
    for diffusion, run in runs.items():
        # Rows out of step share passes of many sizes: only the same run meets all of them.
        bench.pair.decode(replace(run, blocks=_PRIMING) if diffusion.in_step else run)
    ar_done: list[Decoded] = []
    done: dict[Diffusion, list[Decoded]] = {diffusion: [] for diffusion in wanted}
    for _ in range(bench.options.repeats):
        ar_done.append(bench.pair.decode(ar))
        for diffusion, run in runs.items():
            done[diffusion].append(bench.pair.decode(run))
    decoded = [_entry(bench, ar, ar_done)]
    ratios = []
    for diffusion, run in runs.items():
        decoded.append(_entry(bench, run, done[diffusion], diffusion))
        ratios.append(_ratio(bench, run, diffusion, done[diffusion], ar_done))
    return decoded, ratios


def measure_verified(bench: Workbench, rows: int) -> Entry:
    """Runs verified decoding. Random towers never agree, so a draft and its check give one token;
    the speed at other numbers of accepted tokens follows from the time of that cycle."""
    bench.steer(rows)
    options = bench.options
    run = Run("verified", rows, options.context, _VERIFIED_BLOCKS, 1, options.block)
    bench.pair.warm_up(options.block, rows)
    # A whole run: checks of drafts become graphs once they have come often.
    bench.pair.decode(run)
    done = [bench.pair.decode(run) for _ in range(options.repeats)]
    entry = _entry(bench, run, done)
    cycle = statistics.median(decoded.seconds_a_block for decoded in done)
    entry["cycle_ms"] = 1e3 * cycle
    entry["tokens_per_s_if_accepted"] = {
        str(count): rows * count / cycle for count in (1, 2, 4, 8, options.block)
    }
    return entry


def _diffusion_run(bench: Workbench, rows: int, diffusion: Diffusion) -> Run:
    options = bench.options
    return Run(
        "mask_diffusion",
        rows,
        options.context,
        options.rounds * len(PROFILES[diffusion.profile]),
        WARM_BLOCKS,
        options.block,
        diffusion.schedules(rows, options.seed),
    )


def _entry(
    bench: Workbench, run: Run, done: Sequence[Decoded], diffusion: Diffusion | None = None
) -> Entry:
    """An entry of the section `decode`: medians over repeats, and their relative spread."""
    speeds = [decoded.tokens_per_s for decoded in done]
    last = done[-1]
    entry: Entry = {
        "mode": run.mode,
        "profile": diffusion.profile if diffusion else None,
        "sync": diffusion.sync if diffusion else None,
        "rows": run.rows,
        "context": run.context,
        "tokens_per_s": statistics.median(speeds),
        "spread": max(speeds) / min(speeds) - 1.0,
        "tokens_a_block": last.tokens_a_block,
        "nfe_a_block": last.nfe_a_block,
        "open_experts": bench.open_experts,
        "passes": [],
    }
    masked = masked_share(PROFILES[diffusion.profile]) if diffusion else 1.0
    if run.mode != "ar":
        passes = [decoded.denoiser for decoded in done]
        entry["passes"].append(_pass_entry(bench, "denoise", passes, run, masked))
    passes = [decoded.context for decoded in done]
    entry["passes"].append(_pass_entry(bench, _CONTEXT_PASS[run.mode], passes, run, masked))
    return entry


def _pass_entry(
    bench: Workbench, kind: PassKind, passes: Sequence[TowerPasses], run: Run, masked: float
) -> Entry:
    """The passes of a tower in a run, with their floor if every pass had all rows."""
    seconds = statistics.median(each.seconds_a_pass for each in passes)
    rows = passes[-1].rows_a_pass
    entry: Entry = {"kind": kind, "rows_a_pass": rows, "ms": 1e3 * seconds}
    if round(rows, 3) == run.rows:
        floor = bench.floor(kind, run.rows, run.context, masked)
        entry |= floor_entry(floor, seconds, bench.ceilings)
    else:
        entry["unique_experts"] = bench.unique(kind, max(1, round(rows)))
    return entry


def floor_entry(floor: PassFloor, seconds: float, ceilings: Ceilings) -> Entry:
    """A measured pass compared with its floor and the copy bandwidth."""
    bytes_per_s = floor.num_bytes / seconds
    return {
        "unique_experts": floor.unique,
        "gigabytes": floor.num_bytes / 1e9,
        "floor_ms": 1e3 * floor.seconds,
        "share_of_floor": floor.seconds / seconds,
        "terabytes_per_s": bytes_per_s / 1e12,
        "share_of_copy": bytes_per_s / ceilings.bytes_per_s,
    }


def _ratio(
    bench: Workbench,
    run: Run,
    diffusion: Diffusion,
    done: Sequence[Decoded],
    ar_done: Sequence[Decoded],
) -> Entry:
    """An entry of the section `ratios`: the median of mask_diffusion over AR, pair by pair, and the
    ratio of their ceilings."""
    ratios = [a.tokens_per_s / b.tokens_per_s for a, b in zip(done, ar_done, strict=True)]
    ratio = statistics.median(ratios)
    ar_ceiling = run.rows / bench.floor("ar", run.rows, run.context).seconds
    ceiling = ceiling_tokens_per_s(bench, run, diffusion)
    speed = statistics.median(a.tokens_per_s for a in done)
    ar_speed = statistics.median(b.tokens_per_s for b in ar_done)
    return {
        "rows": run.rows,
        "context": run.context,
        "profile": diffusion.profile,
        "sync": diffusion.sync,
        "nfe_a_block": done[-1].nfe_a_block,
        "ratio": ratio,
        "spread": max(ratios) / min(ratios) - 1.0,
        "ceiling": ceiling / ar_ceiling,
        "share_of_ceiling": ratio / (ceiling / ar_ceiling),
        "diffusion_share_of_floor": speed / ceiling,
        "ar_share_of_floor": ar_speed / ar_ceiling,
    }


def ceiling_tokens_per_s(bench: Workbench, run: Run, diffusion: Diffusion) -> float:
    """Tokens/s of a run whose passes all take their floor."""
    masked = masked_share(PROFILES[diffusion.profile])

    @cache
    def denoise(rows: int) -> float:
        return bench.floor("denoise", rows, run.context, masked).seconds

    @cache
    def extend(rows: int) -> float:
        return bench.floor("extend", rows, run.context).seconds

    if diffusion.in_step:
        steps = mean_steps(run.schedules[0])
        return in_step_tokens_per_s(
            run.rows, run.block_size, steps, denoise(run.rows), extend(run.rows)
        )
    return best_tokens_per_s(run.schedules, PassSeconds(denoise, extend))
