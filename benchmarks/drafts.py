"""Drafts of every source: tokens a pass, what they give up against ar, and tokens/s.

    python -m benchmarks.drafts [--model DIR] [--prompts 200] [--tokens 64] [--costs equal] ...

Every held-out prompt is decoded in every way, greedily and at two temperatures, in this process,
prompt i with seed i. A token that ends the text is a token like others. Counted are:

- `all`: tokens over passes of both towers, without those that read the prompt; its last pass gives
  the first token. A draft that reaches beyond the output counts with what is inside.
- `fresh`: the same, over the prompts whose greedy ar output repeats at most half of its 4-grams.
- `whole`: as `all`, but with every token of the last draft that was accepted.
- `equal`: the share of outputs that are ar's, token for token, at the same temperature and seed.
- `loss`: the mean log-probability of ar's tokens less that of these, nats, both the context
  tower's after the output's own tokens; `novel`: that of tokens that complete no 4-gram of the
  output before.
- `lookup` and `denoiser`: accepted of drafted tokens, by who drafted them.
- `tokens/s` and `over ar`: medians of rounds over some of the prompts, in which all ways take
  turns.

With `--costs equal` a pass costs the same in the policy's eyes whatever its tokens, as on a device
where passes are bound by their weights; otherwise costs are measured while rows run. Prints a
table for each temperature, and writes JSON to a file. The exit code is 1 if an output that is
checked strictly differs from ar's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures import median
from benchmarks.in_process import Local, load_local
from benchmarks.machine import machine
from benchmarks.side_by_side import CLOCKS, Clock, Ways, clock_of, decode, ratio, speeds, spread
from benchmarks.tables import Cell, keep, table
from benchmarks.verified import token_ids
from twotower import GenerationResult
from twotower.sweep.metrics import GRAM, Row, figures, repeats
from twotower.towers.engine.options import PREFILL_CHUNK
from twotower.towers.request.params import GenerationParams

MAX_CONTEXT = 1024
TEMPERATURES = (0.0, 0.7, 1.0)
FRESH_REPEATS = 0.5
VERIFIED = GenerationParams(mode="verified")
WAYS: dict[str, GenerationParams] = {
    "ar": GenerationParams(mode="ar"),
    "verified any": VERIFIED,
    "verified lookup": replace(VERIFIED, draft_source="lookup"),
    "verified denoiser": replace(VERIFIED, draft_source="denoiser"),
    "verified denoiser, mix": replace(VERIFIED, draft_source="denoiser", acceptance="mix"),
    "verified any, mix": replace(VERIFIED, acceptance="mix"),
    "auto ar": GenerationParams(mode="auto", quality="ar"),
    "auto near": GenerationParams(mode="auto", quality="near"),
    "auto fast": GenerationParams(mode="auto", quality="fast"),
    "mask_diffusion": GenerationParams(),
    "mask_diffusion released": GenerationParams(commit_rule="released"),
}
# Outputs that have to be ar's.
STRICT = ("verified any", "verified lookup", "verified denoiser", "auto ar")
COLUMNS = (
    *("all", "fresh", "whole", "equal", "loss", "novel"),
    *("lookup", "denoiser", "tokens/s", "over ar"),
)


def main() -> int:
    """Parses the arguments, measures, prints tables; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", help="checkpoint folder; the shipped model if left out")
    parser.add_argument("--prompts", type=int, default=200, help="held-out prompts")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens a prompt")
    parser.add_argument("--temperature", type=float, nargs="+", default=TEMPERATURES)
    parser.add_argument("--way", choices=WAYS, nargs="+", help="all if left out; ar is always run")
    parser.add_argument("--mix-ratio", type=float, default=0.3)
    parser.add_argument("--batch", type=int, default=16, help="prompts decoded at a time")
    parser.add_argument("--costs", choices=("measured", "equal"), default="measured")
    parser.add_argument("--timed-prompts", type=int, default=32, help="prompts of a timed round")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, 0 for none")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for all figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    local = load_local(args.model, args.batch, MAX_CONTEXT)
    if args.costs == "equal":
        local.count_passes_alike()
    found = measure(local, token_ids(local, args.prompts), args)
    keep(found, args.json)
    shares = [way["equal"] for part in found["temperatures"].values() for way in strict(part)]
    return 0 if all(share == 1.0 for share in shares) else 1


def strict(part: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures of the ways whose outputs have to be ar's."""
    return [part[name] for name in STRICT if name in part]


def measure(local: Local, prompts: list[list[int]], args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one run; prints a table as soon as it is known."""
    chosen = [name for name in WAYS if name in {"ar", *(args.way or WAYS)}]
    ways = {
        name: replace(WAYS[name], max_tokens=args.tokens, mix_ratio=args.mix_ratio)
        for name in chosen
    }
    fresh = fresh_ones(decode(local, prompts, ways["ar"]))
    print(f"{len(prompts)} prompts, {len(fresh)} of them fresh; costs {args.costs}.")
    temperatures = {}
    for temperature in args.temperature:
        here = {name: replace(way, temperature=temperature) for name, way in ways.items()}
        part = at_temperature(local, prompts, fresh, here)
        if args.rounds:
            add_speeds(local, prompts[: args.timed_prompts], here, args.rounds, args.clock, part)
        temperatures[f"{temperature:g}"] = part
        lines = {name: cells(way) for name, way in part.items()}
        print(f"\nTemperature {temperature:g}:\n\n{table(COLUMNS, lines)}", flush=True)
    return {
        "machine": machine(args.threads),
        "prompts": len(prompts),
        "fresh_prompts": len(fresh),
        "tokens": args.tokens,
        "batch": args.batch,
        "costs": args.costs,
        "clock": args.clock,
        "mix_ratio": args.mix_ratio,
        "temperatures": temperatures,
    }


def fresh_ones(results: Sequence[GenerationResult]) -> list[int]:
    """The numbers of the outputs that repeat at most half of their 4-grams."""
    return [i for i, found in enumerate(results) if repeated(found.token_ids) <= FRESH_REPEATS]


def repeated(token_ids: Sequence[int]) -> float:
    """The share of an output's 4-grams that stand earlier in it."""
    return sum(repeats(token_ids)) / max(1, len(token_ids) - GRAM + 1)


def at_temperature(
    local: Local, prompts: Sequence[list[int]], fresh: Sequence[int], ways: Ways
) -> dict[str, dict[str, Any]]:
    """By way, what its outputs and passes tell."""
    baseline, part = list[Row](), dict[str, dict[str, Any]]()
    for name, params in ways.items():
        results = decode(local, prompts, params)
        # Other modes tell the log-probabilities of the tower that has drawn.
        scored = params.traits.tokens_from == "context"
        rows = rows_of(prompts, results, None if scored else local)
        baseline = baseline or rows
        part[name] = outcome(rows, baseline, fresh) | by_source(results)
        part[name]["whole"] = whole(rows, results)
    return part


def rows_of(
    prompts: Sequence[list[int]], results: Sequence[GenerationResult], scoring: Local | None
) -> list[Row]:
    """Outputs with the context tower's log-probabilities and the passes after the prompt. `scoring`
    reads those that another tower has drawn; None: they are the context tower's."""
    rows = []
    for prompt, result in zip(prompts, results, strict=True):
        log_probs = result.log_probs
        if scoring is not None:
            log_probs = scoring.model.score([*prompt, *result.token_ids])[len(prompt) - 1 :]
        rows.append(
            Row(
                tuple(result.token_ids),
                result.text,
                result.finish_reason,
                tuple(log_probs),
                result.nfe,
                result.context_passes - -(-len(prompt) // PREFILL_CHUNK),
                result.accepted_tokens,
                result.drafted_tokens,
            )
        )
    return rows


def outcome(rows: Sequence[Row], baseline: Sequence[Row], fresh: Sequence[int]) -> dict[str, Any]:
    """Tokens a pass of all outputs and of the fresh ones, and how they compare with ar's."""
    found = figures(rows, baseline, baseline)
    return {
        "all": round(found["tokens_per_pass"], 3),
        "fresh": per_pass([rows[index] for index in fresh]),
        "equal": round(found["exact_share"], 4),
        "loss": round(found["loss"], 4),
        "novel": round(found["novel_loss"], 4),
        "nfe": found["nfe"],
        "context_passes": found["context_passes"],
    }


def per_pass(rows: Sequence[Row]) -> float | None:
    """Tokens over passes of both towers; None without rows."""
    passes = sum(row.nfe + row.context_passes for row in rows)
    return round(sum(len(row.token_ids) for row in rows) / passes, 3) if passes else None


def whole(rows: Sequence[Row], results: Sequence[GenerationResult]) -> float | None:
    """Tokens a pass with all that was accepted of the last drafts: each pass of the context tower
    gives a token beside those. None where nothing is drafted."""
    if not any(row.drafted_tokens for row in rows):
        return None
    tokens = 0
    for row, result in zip(rows, results, strict=True):
        beyond = result.finish_reason == "length"
        drawn = row.accepted_tokens + row.context_passes
        tokens += max(drawn, len(row.token_ids)) if beyond else len(row.token_ids)
    return round(tokens / sum(row.nfe + row.context_passes for row in rows), 3)


def by_source(results: Sequence[GenerationResult]) -> dict[str, list[int]]:
    """Accepted and drafted tokens of lookups and of the denoiser."""
    accepted = sum(result.accepted_tokens for result in results)
    drafted = sum(result.drafted_tokens for result in results)
    looked_up = [
        sum(result.lookup_accepted_tokens for result in results),
        sum(result.lookup_drafted_tokens for result in results),
    ]
    return {"lookup": looked_up, "denoiser": [accepted - looked_up[0], drafted - looked_up[1]]}


def add_speeds(
    local: Local,
    prompts: Sequence[list[int]],
    ways: Ways,
    rounds: int,
    clock: str,
    part: dict[str, dict[str, Any]],
) -> None:
    """Adds tokens/s, and their ratio to ar's in the same round."""
    reading: Clock = clock_of(clock)
    found = speeds(local, prompts, ways, rounds, reading)
    for name, rates in found.items():
        part[name]["tokens_per_s"] = median(rates)
        part[name]["over_ar"] = ratio(rates, found["ar"])


def cells(way: dict[str, Any]) -> list[Cell]:
    """A way's line of the table."""
    shown: list[Cell] = [way[name] for name in COLUMNS[:6]]
    shown += ["{} of {}".format(*way[source]) for source in ("lookup", "denoiser")]
    timed = way.get("over_ar")
    return [*shown, way.get("tokens_per_s"), None if timed is None else spread(timed)]


if __name__ == "__main__":
    sys.exit(main())
