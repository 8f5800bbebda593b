"""Verified decoding against ar: the same tokens, tokens per pass, and what a mix gives up.

    python -m benchmarks.verified [--model DIR] [--prompts 200] [--tokens 64] [--parts PART ...]

First (part `against_ar`) every held-out prompt is decoded in both modes, greedy and drawn
(temperature 1, top_p 0.9, a seed per prompt), and the outputs are compared token for token. Then
(`draft_steps`) a smaller set is decoded with 1 to 16 draft steps: accepted tokens a draft, tokens
per (denoiser + context) pass and tokens/s, with an ar run beside each. Last (`acceptance`) all
prompts are decoded with drafts of the denoiser in one pass, accepted strictly and by a mix with
several ratios: tokens per pass, and the loss of log-probability against ar, of all tokens and of
those that do not repeat (`novel_loss`). Passes that read the prompt are not counted; they give ar
its first token. Prints one JSON object; the exit code is 1 if an output that should be ar's
differs.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.figures import median
from benchmarks.in_process import Local, load_local
from benchmarks.machine import machine
from benchmarks.prompts import held_out_prompts
from twotower import GenerationResult, Request
from twotower.sweep.metrics import Row, figures
from twotower.towers.decoding.services import Block
from twotower.towers.engine.options import PREFILL_CHUNK
from twotower.towers.request.params import GenerationParams
from twotower.towers.training.corpus import read_corpus, standard_library

DRAWS = {
    "greedy": GenerationParams(mode="ar"),
    "drawn": GenerationParams(mode="ar", temperature=1.0, top_p=0.9),
}
DRAFT_STEPS = (1, 2, 3, 4, 6, 8, 12, 16)
MIX_RATIOS = (0.3, 0.5, 1.0)
TEMPERATURES = (0.0, 0.7)
PARTS = ("against_ar", "draft_steps", "acceptance")
MAX_CONTEXT = 1024
# Of a point's figures, those that acceptance is about.
SHOWN = ("loss", "novel_loss", "agreement", "repeated_share")


def main() -> int:
    """Parses the arguments, measures, prints JSON; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="checkpoint folder; the shipped model if left out")
    parser.add_argument("--prompts", type=int, default=200, help="prompts that are compared")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens a prompt")
    parser.add_argument("--sweep-prompts", type=int, default=16, help="prompts per draft steps")
    parser.add_argument("--draft-steps", type=int, nargs="+", default=DRAFT_STEPS)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--mix-ratio", type=float, nargs="+", default=MIX_RATIOS)
    parser.add_argument(
        "--temperature", type=float, nargs="+", default=TEMPERATURES, help="of part acceptance"
    )
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16, help="prompts decoded at a time")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    local = load_local(args.model, args.batch, MAX_CONTEXT)
    found = measure(local, token_ids(local, max(args.prompts, args.sweep_prompts)), args)
    print(json.dumps(found, indent=2))
    equal = found.get("against_ar", {}).values()
    return 0 if all(part["equal"] == part["prompts"] for part in equal) else 1


def token_ids(local: Local, count: int) -> list[list[int]]:
    """Held-out prompts as token ids. Raises ValueError if there are fewer than `count`."""
    prompts = held_out_prompts(read_corpus(standard_library()), count)
    if len(prompts) < count:
        raise ValueError(f"prompts: got {count}, expected at most {len(prompts)} held-out ones")
    return [local.model.encode(prompt.text) for prompt in prompts]


def measure(local: Local, prompts: list[list[int]], args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one run."""
    config = local.model.config
    draws = {
        name: replace(draw, max_tokens=args.tokens, block_size=args.block)
        for name, draw in DRAWS.items()
    }
    greedy = draws["greedy"]
    decode(local, prompts[: args.batch], replace(greedy, mode="verified", max_tokens=16))
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "against_ar": lambda: {
            name: against_ar(local, prompts[: args.prompts], draw) for name, draw in draws.items()
        },
        "draft_steps": lambda: {
            name: sweep(local, prompts[: args.sweep_prompts], draw, args.draft_steps)
            for name, draw in draws.items()
        },
        "acceptance": lambda: acceptance(
            local, prompts[: args.prompts], greedy, args.temperature, args.mix_ratio
        ),
    }
    return {
        "machine": machine(args.threads) | {"python": platform.python_version()},
        "shape": {
            "hidden": config.hidden_size,
            "pattern": config.layer_pattern,
            "dtype": "float32",
            "block": args.block,
            "batch": args.batch,
            "tokens": args.tokens,
            "confidence_threshold": greedy.confidence_threshold,
        },
        **{part: parts[part]() for part in PARTS if part in args.parts},
    }


def against_ar(
    local: Local, prompts: Sequence[list[int]], params: GenerationParams
) -> dict[str, Any]:
    """The number of outputs that are equal to those of ar, and the first difference of the
    others."""
    ar, ar_seconds = decode(local, prompts, params)
    verified, seconds = decode(local, prompts, replace(params, mode="verified"))
    pairs = zip(ar, verified, strict=True)
    found = [first_difference(index, *pair) for index, pair in enumerate(pairs)]
    differences = [difference for difference in found if difference is not None]
    return {
        "prompts": len(prompts),
        "equal": len(prompts) - len(differences),
        "differences": differences,
        "tokens_compared": sum(len(result.token_ids) for result in ar),
        "ar": speed(prompts, ar, ar_seconds),
        "verified": speed(prompts, verified, seconds) | drafts(verified),
    }


def first_difference(
    index: int, ar: GenerationResult, verified: GenerationResult
) -> dict[str, int | float] | None:
    """The first position at which two outputs of prompt `index` differ, their tokens there and the
    context tower's natural-log probabilities of these tokens; None if the outputs are equal.

    Raises ValueError if one output is only the beginning of the other.
    """
    pairs = zip(ar.token_ids, verified.token_ids, strict=False)
    for position, (ar_token, verified_token) in enumerate(pairs):
        if ar_token != verified_token:
            return {
                "prompt": index,
                "position": position,
                "ar_token": ar_token,
                "ar_log_prob": ar.log_probs[position],
                "verified_token": verified_token,
                "verified_log_prob": verified.log_probs[position],
            }
    lengths = len(ar.token_ids), len(verified.token_ids)
    if lengths[0] != lengths[1]:
        raise ValueError(f"prompt {index}: got {lengths[1]} tokens, expected ar's {lengths[0]}")
    return None


def sweep(
    local: Local, prompts: Sequence[list[int]], base: GenerationParams, draft_steps: Sequence[int]
) -> dict[str, Any]:
    """Figures for every number of draft steps; ar is run again beside each."""
    rounds: dict[int, dict[str, Any]] = {}
    ars = []
    for steps in draft_steps:
        ars.append(speed(prompts, *decode(local, prompts, base)))
        params = replace(base, mode="verified", draft_steps=steps)
        verified, seconds = decode(local, prompts, params)
        rounds[steps] = speed(prompts, verified, seconds) | drafts(verified)
        ratio = rounds[steps]["tokens_per_s"] / ars[-1]["tokens_per_s"]
        rounds[steps]["speed_over_ar"] = round(ratio, 3)
    return {
        "prompts": len(prompts),
        "ar": {name: median(ar[name] for ar in ars) for name in ars[0]},
        "verified": rounds,
    }


def acceptance(
    local: Local,
    prompts: Sequence[list[int]],
    greedy: GenerationParams,
    temperatures: Sequence[float],
    ratios: Sequence[float],
) -> dict[str, Any]:
    """Figures of drafts of the denoiser alone, by temperature and by how they are accepted.

    Rows run a block further than they are looked at, so that the last draft counts as a whole.
    """
    tokens = greedy.max_tokens
    greedy = replace(greedy, max_tokens=tokens + greedy.block_size)
    drafted = replace(greedy, mode="verified", draft_source="denoiser")
    kinds = {"strict": drafted} | {
        f"mix {ratio:g}": replace(drafted, acceptance="mix", mix_ratio=ratio) for ratio in ratios
    }
    found: dict[str, Any] = {"prompts": len(prompts)}
    for temperature in temperatures:
        ar = replace(greedy, temperature=temperature)
        baseline = rows(prompts, decode(local, prompts, ar)[0], tokens)
        repeated = figures(baseline, baseline, baseline)["repeated_share"]
        table: dict[str, Any] = {"ar": {"repeated_share": round(repeated, 4)}}
        found[f"temperature {temperature:g}"] = table
        for name, params in kinds.items():
            results, _ = decode(local, prompts, replace(params, temperature=temperature))
            shown = _shown(prompts, results, tokens, baseline)
            table[name] = shown | drafts(results)
    return found


def rows(
    prompts: Sequence[list[int]], results: Sequence[GenerationResult], tokens: int
) -> list[Row]:
    """The first `tokens` tokens of outputs, with the passes up to the end of their last block and
    without those that read the prompts."""
    found = []
    for prompt, result in zip(prompts, results, strict=True):
        blocks = _blocks_of(result, tokens)
        found.append(
            Row(
                tuple(result.token_ids[:tokens]),
                result.text,
                result.finish_reason,
                tuple(result.log_probs[:tokens]),
                sum(block.nfe for block in blocks),
                sum(block.context_passes for block in blocks) - _reading(prompt),
            )
        )
    return found


def _blocks_of(result: GenerationResult, tokens: int) -> Sequence[Block]:
    """Blocks up to the one that has an output's last of `tokens` tokens."""
    count = 0
    for index, block in enumerate(result.blocks):
        count += len(block.token_ids)
        if count >= tokens:
            return result.blocks[: index + 1]
    return result.blocks


def _shown(
    prompts: Sequence[list[int]],
    results: Sequence[GenerationResult],
    tokens: int,
    baseline: Sequence[Row],
) -> dict[str, float]:
    """Figures against ar at the same temperature, `agreement` of tokens with it too;
    `cut_tokens_per_pass` counts no token of the last draft that is beyond `tokens`."""
    found = rows(prompts, results, tokens)
    every = figures(found, baseline, baseline)
    passes = every["nfe"] + every["context_passes"]
    whole = sum(len(b.token_ids) for result in results for b in _blocks_of(result, tokens))
    shown = {name: round(every[name], 4) for name in SHOWN}
    return {
        "tokens_per_pass": round(whole / passes, 3),
        "cut_tokens_per_pass": round(every["tokens_per_pass"], 3),
    } | shown


def decode(
    local: Local, prompts: Sequence[list[int]], params: GenerationParams
) -> tuple[list[GenerationResult], float]:
    """Results of all prompts and the seconds that they took; prompt i has seed i. The engines run
    as many at a time as they have slots."""
    requests = [
        Request(prompt, replace(params, seed=index)) for index, prompt in enumerate(prompts)
    ]
    started = time.perf_counter()
    results = local.model.generate_requests(requests)
    return results, time.perf_counter() - started


def speed(
    prompts: Sequence[list[int]], results: Sequence[GenerationResult], seconds: float
) -> dict[str, float]:
    """Tokens per second, and per pass of either tower after the prompt."""
    tokens = sum(len(result.token_ids) for result in results)
    reading = sum(_reading(prompt) for prompt in prompts)
    passes = sum(result.nfe + result.context_passes for result in results) - reading
    return {
        "tokens_per_pass": round(tokens / passes, 3),
        "tokens_per_s": round(tokens / seconds, 1),
    }


def _reading(prompt: Sequence[int]) -> int:
    """Passes that read a prompt."""
    return -(-len(prompt) // PREFILL_CHUNK)


def drafts(results: Sequence[GenerationResult]) -> dict[str, float]:
    """Mean numbers of accepted tokens, drafted tokens and denoiser passes per draft."""
    count = sum(len(result.blocks) for result in results)
    return {
        "accepted_per_draft": _mean([result.accepted_tokens for result in results], count),
        "drafted_per_draft": _mean([result.drafted_tokens for result in results], count),
        "passes_per_draft": _mean([result.nfe for result in results], count),
    }


def _mean(values: Sequence[int], count: int) -> float:
    return round(sum(values) / count, 3)


if __name__ == "__main__":
    sys.exit(main())
