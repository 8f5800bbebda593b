"""Whether rows that share passes get what they get alone: tokens, and bits.

On a GPU kernels are chosen by what a pass holds, and sums in another order have other last bits,
which now and then decide a token. Deterministic towers, and all on a CPU, have none of this.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from twotower.bench.decode import Run
from twotower.bench.workbench import Workbench
from twotower.planner.schedules import shuffled_rows
from twotower.towers.decoding.services import Block
from twotower.towers.request.modes import Mode

Entry = dict[str, Any]
Written = Mapping[int, Sequence[Block]]
MODES: tuple[Mode, ...] = ("ar", "mask_diffusion")
# Rows that are also decoded alone, and blocks that each of them writes.
_COMPARED, _BLOCKS = 16, 2
# Long enough for a context to be read in several splits.
_MOST_PROMPT = 1024


def measure_invariance(bench: Workbench, mode: Mode) -> Iterator[Entry]:
    """Decodes rows in batches of each size and alone -> for each size the shares of rows whose
    tokens, and of rows of which any bit differs. Rows that are out of step share passes of many
    sizes."""
    sizes = sorted(set(bench.options.batches))
    most = sizes[-1]
    bench.steer(most)
    bench.pair.warm_up(bench.options.block, most)
    run = _run(bench, mode, most)
    prompts = _prompts(bench, most)
    alone: dict[int, Sequence[Block]] = {}
    for row in range(min(most, _COMPARED)):
        alone |= bench.pair.generate(run, {row: prompts[row]})
    for size in sizes:
        together = bench.pair.generate(run, {row: prompts[row] for row in range(size)})
        yield {
            "mode": mode,
            "rows": size,
            "prompt": run.context,
            "tokens": run.blocks * run.block_size,
            **differences(together, alone),
        }


def differences(together: Written, alone: Written) -> Entry:
    """How many rows are in both, and the shares of them whose tokens, or any bit of the tokens'
    log-probabilities, differ."""
    rows = sorted({*together} & {*alone})
    tokens = [_tokens(together[row]) != _tokens(alone[row]) for row in rows]
    bits = [_log_probs(together[row]) != _log_probs(alone[row]) for row in rows]
    either = [one or other for one, other in zip(tokens, bits, strict=True)]
    return {
        "compared": len(rows),
        "tokens_differ": sum(tokens) / len(rows),
        "bits_differ": sum(either) / len(rows),
    }


def _run(bench: Workbench, mode: Mode, rows: int) -> Run:
    options = bench.options
    schedules = shuffled_rows("headline", rows, options.seed, in_step=False)
    prompt = min(options.context, _MOST_PROMPT)
    return Run(mode, rows, prompt, _BLOCKS, 0, options.block, schedules)


def _prompts(bench: Workbench, rows: int) -> list[list[int]]:
    """Prompts of random tokens, all but the first a little shorter than the longest."""
    longest = min(bench.options.context, _MOST_PROMPT)
    generator = torch.Generator().manual_seed(bench.options.seed)
    vocab = bench.config.vocab_size
    lengths = [max(1, longest - row % bench.options.block) for row in range(rows)]
    return [torch.randint(vocab, (length,), generator=generator).tolist() for length in lengths]


def _tokens(blocks: Sequence[Block]) -> list[int]:
    return [token for block in blocks for token in block.token_ids]


def _log_probs(blocks: Sequence[Block]) -> list[float]:
    return [value for block in blocks for value in block.log_probs]
