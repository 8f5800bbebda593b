"""auto against every fixed choice, where the best of them differs.

    python -m benchmarks.auto [--model DIR] [--setting NAME ...] [--rounds 5] [--prompts 64]

In this process, greedy. Each setting is a number of rows at a time, a kind of text and delays of
passes: `slowed by half` are passes that last 1.5 times as long as they compute; where the denoiser
is nearly free every pass of the context tower lasts as long as 20 steps more, whatever its tokens.
Delays happen inside of passes, so that engines measure them as their own. Every setting begins with
fresh engines, which a round warms up. Text loops if more than half of the 4-grams of its greedy ar
output repeat, otherwise it is fresh.

Printed is tokens/s of auto over the fixed choice with the most: medians of rounds in which all
choices take turns, with the least and largest. With quality `ar` the fixed choices are those with
ar's tokens; with `fast` mask_diffusion and mixed acceptance as well. The target is 0.95.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.drafts import by_source, fresh_ones
from benchmarks.figures import median
from benchmarks.in_process import Local, load_local
from benchmarks.machine import machine
from benchmarks.side_by_side import CLOCKS, Delay, clock_of, decode, ratio, speeds, spread
from benchmarks.tables import Cell, keep, table
from benchmarks.verified import token_ids
from twotower.towers.request.params import GenerationParams

MAX_CONTEXT = 1024
VERIFIED = GenerationParams(mode="verified")
AR = GenerationParams(mode="ar")
# Fixed choices of either quality, and those that `fast` has beside them.
SAME_TOKENS: dict[str, GenerationParams] = {
    "ar": AR,
    "any": VERIFIED,
    "lookup": replace(VERIFIED, draft_source="lookup"),
    "denoiser": replace(VERIFIED, draft_source="denoiser"),
}
OTHER_TOKENS: dict[str, GenerationParams] = {
    "any, mix": replace(VERIFIED, acceptance="mix"),
    "mask_diffusion": GenerationParams(),
}
AUTO: dict[str, GenerationParams] = {
    "auto ar": GenerationParams(mode="auto", quality="ar"),
    "auto fast": GenerationParams(mode="auto", quality="fast"),
}


@dataclass(frozen=True)
class Setting:
    """Rows at a time (None: as many as asked for), text, and delays: shares of what a tower's
    passes compute, and how many steps more each pass of the context tower lasts. `part` of the
    prompts are decoded, where that takes long."""

    rows: int | None = None
    text: Literal["any", "looping", "fresh"] = "any"
    context: float = 0.0
    denoiser: float = 0.0
    steps: float = 0.0
    part: float = 1.0


SETTINGS: dict[str, Setting] = {
    "1 row": Setting(rows=1, part=0.125),
    "16 rows": Setting(),
    "looping text": Setting(text="looping"),
    "fresh text": Setting(text="fresh"),
    "context tower slowed by half": Setting(context=0.5),
    "denoiser slowed by half": Setting(denoiser=0.5),
    "denoiser nearly free": Setting(rows=4, steps=20.0, part=0.0625),
}


def main() -> int:
    """Parses the arguments, measures, prints the tables; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", help="checkpoint folder; the shipped model if left out")
    parser.add_argument("--setting", choices=SETTINGS, action="append", help="all if left out")
    parser.add_argument("--pool", type=int, default=160, help="prompts that text is chosen from")
    parser.add_argument("--prompts", type=int, default=64, help="prompts of a round")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens a prompt")
    parser.add_argument("--batch", type=int, default=16, help="prompts decoded at a time")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for all figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    texts = texts_of(args)
    settings = {}
    for name in args.setting or SETTINGS:
        settings[name] = measure(SETTINGS[name], texts, args)
        print(f"\n{name}:\n\n{shown(settings[name])}", flush=True)
    print(f"\nauto over the best fixed choice:\n\n{summary(settings)}")
    keep({"machine": machine(args.threads), "clock": args.clock, "settings": settings}, args.json)
    return 0


def texts_of(args: argparse.Namespace) -> dict[str, list[list[int]]]:
    """Prompts by the kind of text that follows them."""
    local = load_local(args.model, args.batch, MAX_CONTEXT)
    prompts = token_ids(local, args.pool)
    fresh = set(fresh_ones(decode(local, prompts, replace(AR, max_tokens=args.tokens))))
    return {
        "any": prompts,
        "fresh": [prompt for index, prompt in enumerate(prompts) if index in fresh],
        "looping": [prompt for index, prompt in enumerate(prompts) if index not in fresh],
    }


def measure(
    setting: Setting, texts: Mapping[str, list[list[int]]], args: argparse.Namespace
) -> dict[str, Any]:
    """All figures of a setting."""
    local = load_local(args.model, setting.rows or args.batch, MAX_CONTEXT)
    prompts = texts[setting.text][: max(1, round(setting.part * args.prompts))]
    ways = {
        name: replace(way, max_tokens=args.tokens)
        for name, way in (SAME_TOKENS | OTHER_TOKENS | AUTO).items()
    }
    delays = delayed(local, setting, prompts)
    clock = clock_of(args.clock, delays)
    speeds(local, prompts, ways, 1, clock)
    found = speeds(local, prompts, ways, args.rounds, clock)
    drafted = {name: by_source(decode(local, prompts, ways[name])) for name in AUTO}
    return {"prompts": len(prompts), **compared(found), "drafted": drafted}


def delayed(local: Local, setting: Setting, prompts: Sequence[list[int]]) -> list[Delay]:
    """Puts the setting's delays into both towers."""
    decode(local, prompts, replace(AR, max_tokens=16))
    stats = local.context.stats()
    delays = [
        Delay(setting.context, setting.steps * stats.pass_seconds / stats.passes),
        Delay(setting.denoiser),
    ]
    delays[0].put_into(local.context)
    delays[1].put_into(local.denoiser)
    return delays


def compared(found: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Tokens/s of every choice, and of auto over the best fixed one of its quality."""
    fixed = {"auto ar": tuple(SAME_TOKENS), "auto fast": (*SAME_TOKENS, *OTHER_TOKENS)}
    autos = {}
    for name, choices in fixed.items():
        best = max(choices, key=lambda choice: median(found[choice]))
        autos[name] = {"best": best, "over_best": ratio(found[name], found[best])}
    return {
        "tokens_per_s": {name: median(rates) for name, rates in found.items()},
        "over_ar": {name: ratio(rates, found["ar"]) for name, rates in found.items()},
        "auto": autos,
    }


def shown(part: Mapping[str, Any]) -> str:
    """A setting's table."""
    lines: dict[str, list[Cell]] = {}
    for name, rate in part["tokens_per_s"].items():
        drafted = part["drafted"].get(name, {})
        sources = ["{} of {}".format(*counts) for counts in drafted.values()] or [None, None]
        lines[name] = [rate, spread(part["over_ar"][name]), *sources]
    return table(("tokens/s", "over ar", "lookup", "denoiser"), lines)


def summary(settings: Mapping[str, Mapping[str, Any]]) -> str:
    """auto over the best fixed choice in every setting."""
    lines: dict[str, list[Cell]] = {}
    for name, part in settings.items():
        autos = part["auto"].values()
        lines[name] = [cell for auto in autos for cell in (spread(auto["over_best"]), auto["best"])]
    columns = [column for name in AUTO for column in (name, "best fixed choice")]
    return table(columns, lines)


if __name__ == "__main__":
    sys.exit(main())
