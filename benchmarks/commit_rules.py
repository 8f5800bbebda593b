"""The commit rules of mask_diffusion: tokens a pass, and what they give up against ar.

    python -m benchmarks.commit_rules [--model DIR] [--prompts 100] [--first 0] [--tokens 64]

Every held-out prompt is decoded with each rule, in this process. Passes of both towers count, with
every extension by a block, but not those that read the prompt. Regret is the mean over all tokens
of max log p - log p(token), nats, where p is the context tower's distribution after the output's
own tokens before; `tokenizes` the share of outputs that, cut at their last full line, continue
their prompt as Python. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from benchmarks.in_process import Local, load_local
from benchmarks.prompts import Prompt, completes, held_out_prompts
from twotower import GenerationResult, Request
from twotower.towers.engine.options import PREFILL_CHUNK
from twotower.towers.request.params import GenerationParams
from twotower.towers.training.corpus import read_corpus, standard_library

MAX_CONTEXT = 1024
RULES = {
    "ar": GenerationParams(mode="ar"),
    "released .8": GenerationParams(commit_rule="released"),
    "leftmost .8": GenerationParams(commit_rule="leftmost", first_token="denoiser"),
    "leftmost .8, first token": GenerationParams(commit_rule="leftmost"),
    "leftmost .75, first token": GenerationParams(
        commit_rule="leftmost", confidence_threshold=0.75
    ),
    "leftmost .7, first token": GenerationParams(commit_rule="leftmost", confidence_threshold=0.7),
    "product .5, first token": GenerationParams(commit_rule="product", confidence_threshold=0.5),
    "product .6, first token": GenerationParams(commit_rule="product", confidence_threshold=0.6),
    "verified, 1 step": GenerationParams(mode="verified", draft_source="denoiser"),
    "verified, 2 steps": GenerationParams(mode="verified", draft_source="denoiser", draft_steps=2),
}


def main() -> int:
    """Parses the arguments, measures, prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", help="checkpoint folder; the shipped model if left out")
    parser.add_argument("--prompts", type=int, default=100, help="held-out prompts")
    parser.add_argument("--first", type=int, default=0, help="number of the first prompt")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens a prompt")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--rule", choices=RULES, action="append", help="all if left out")
    parser.add_argument("--batch", type=int, default=16, help="prompts decoded at a time")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    prompts = chosen_prompts(args.first, args.prompts)
    local = load_local(args.model, args.batch, MAX_CONTEXT)
    ids = [local.model.encode(prompt.text) for prompt in prompts]
    last = args.first + len(prompts) - 1
    print(f"Prompts {args.first}-{last}, {args.tokens} tokens, temperature {args.temperature:g}.\n")
    print("| rule | tokens a pass | regret | tokenizes |\n|---|---|---|---|")
    for name in args.rule or RULES:
        params = replace(RULES[name], max_tokens=args.tokens, temperature=args.temperature)
        results = decode(local, ids, params)
        quality = regret(local, ids, results), valid(prompts, results)
        cells = tokens_per_pass(ids, results), *quality
        print(f"| {name} | {' | '.join(f'{cell:.3f}' for cell in cells)} |", flush=True)
    return 0


def chosen_prompts(first: int, count: int) -> list[Prompt]:
    """That many held-out prompts from number `first` on. Raises ValueError if there are fewer."""
    found = held_out_prompts(read_corpus(standard_library()), first + count)
    if count < 1 or len(found) < first + count:
        raise ValueError(f"prompts: got {first} + {count}, expected at most {len(found)} held out")
    return found[first:]


def decode(
    local: Local, prompts: Sequence[list[int]], params: GenerationParams
) -> list[GenerationResult]:
    """The result of each prompt; prompt i has seed i."""
    requests = [
        Request(prompt, replace(params, seed=index)) for index, prompt in enumerate(prompts)
    ]
    return local.model.generate_requests(requests)


def tokens_per_pass(prompts: Sequence[list[int]], results: Sequence[GenerationResult]) -> float:
    """Tokens over the passes of both towers after the prompt."""
    tokens = sum(len(result.token_ids) for result in results)
    reading = sum(-(-len(prompt) // PREFILL_CHUNK) for prompt in prompts)
    return tokens / (sum(result.nfe + result.context_passes for result in results) - reading)


def regret(
    local: Local, prompts: Sequence[list[int]], results: Sequence[GenerationResult]
) -> float:
    """Mean of max log p - log p(token) over the output's tokens, in nats."""
    parts = []
    for prompt, result in zip(prompts, results, strict=True):
        [logits] = local.model.logits([[*prompt, *result.token_ids]])
        log_probs = torch.log_softmax(logits[len(prompt) - 1 : -1].float(), dim=-1)
        own = log_probs.gather(1, torch.tensor(result.token_ids)[:, None]).squeeze(1)
        parts.append(log_probs.amax(1) - own)
    return float(torch.cat(parts).double().mean())


def valid(prompts: Sequence[Prompt], results: Sequence[GenerationResult]) -> float:
    """The share of outputs that continue their prompts as Python."""
    pairs = zip(prompts, results, strict=True)
    return sum(completes(prompt.text, result.text) for prompt, result in pairs) / len(prompts)


if __name__ == "__main__":
    sys.exit(main())
