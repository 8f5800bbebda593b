"""Compares the outputs of two checkpoints of a model, before and after a change of weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

from twotower.api import Request, TwoTower
from twotower.kernels.quantized import ExpertProducts
from twotower.results import GenerationResult
from twotower.towers.request.modes import Mode
from twotower.towers.request.params import GenerationParams
from twotower.towers.request.token_ids import Prompt

# Beginnings of code, reports and explanations, for a first look at any model.
PROMPTS = (
    "import os\n\n\ndef ",
    "def read_lines(path):\n    with open(path) as file:\n",
    "class Queue:\n    def __init__(self, size):\n",
    "for name, value in sorted(items):\n    print(",
    "The capital of France is",
    "Question: A farmer has 17 sheep and buys 5 more. How many has he now?\nAnswer:",
    "To boil an egg, first",
    "The three laws of motion say that",
)
MODES: tuple[Mode, ...] = ("mask_diffusion", "ar")


@dataclass(frozen=True)
class Cost:
    """Cost of a checkpoint's outputs; `tokens_per_nfe` is None without denoiser passes."""

    tokens: int
    nfe: int
    tokens_per_nfe: float | None


@dataclass(frozen=True)
class Agreement:
    """Outputs of two checkpoints in one mode.

    `equal_outputs` of the `prompts` gave the same tokens; `equal_share` is the share of the tokens
    of the `before` outputs that come before the first difference.
    """

    mode: Mode
    prompts: int
    equal_outputs: int
    equal_share: float
    before: Cost
    after: Cost


@dataclass(frozen=True)
class Comparison:
    """Agreement by mode, and the context towers' mean losses of the same texts in nats a token."""

    modes: tuple[Agreement, ...]
    loss_before: float
    loss_after: float


@dataclass(frozen=True)
class Outputs:
    """Results of a checkpoint in each of MODES, and its context tower's loss in nats a token."""

    results: tuple[list[GenerationResult], ...]
    loss: float


def compare(
    before: Path,
    after: Path,
    prompts: Sequence[Prompt] = PROMPTS,
    texts: Sequence[Prompt] | None = None,
    params: GenerationParams | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    expert_products: ExpertProducts = "widened",
) -> Comparison:
    """Decodes `prompts` with both checkpoints in every mode and scores `texts` (None: the
    prompts). One checkpoint is in memory at a time.

    `params` are those of mask_diffusion; None means greedy with the defaults, up to the model's
    end-of-text token. Experts of `after` are multiplied as `expert_products` says. Raises
    CheckpointError, ConfigError, InvalidRequestError.
    """
    scored = prompts if texts is None else texts
    first = outputs(before, prompts, scored, params, device, dtype)
    second = outputs(after, prompts, scored, params, device, dtype, expert_products)
    return comparison(first, second)


def comparison(before: Outputs, after: Outputs) -> Comparison:
    """Compares the outputs of two checkpoints for the same prompts and texts."""
    pairs = zip(MODES, before.results, after.results, strict=True)
    agreements = tuple(agreement(mode, old, new) for mode, old, new in pairs)
    return Comparison(agreements, before.loss, after.loss)


def agreement(
    mode: Mode, before: Sequence[GenerationResult], after: Sequence[GenerationResult]
) -> Agreement:
    """Compares results prompt by prompt."""
    equal_outputs = equal_tokens = 0
    for old, new in zip(before, after, strict=True):
        equal_outputs += old.token_ids == new.token_ids
        equal_tokens += common_prefix(old.token_ids, new.token_ids)
    cost = _cost(before)
    share = equal_tokens / cost.tokens if cost.tokens else 1.0
    return Agreement(mode, len(before), equal_outputs, share, cost, _cost(after))


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of tokens of two outputs before their first difference."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def outputs(
    folder: Path,
    prompts: Sequence[Prompt],
    texts: Sequence[Prompt],
    params: GenerationParams | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    expert_products: ExpertProducts = "widened",
) -> Outputs:
    """What `compare` compares, of one checkpoint; arguments and errors as there."""
    model = TwoTower.from_pretrained(folder, device, dtype, expert_products=expert_products)
    chosen = params or GenerationParams(eos_token_id=model.config.eos_token_id)
    results = tuple(
        model.generate_requests([Request(prompt, replace(chosen, mode=mode)) for prompt in prompts])
        for mode in MODES
    )
    scores = [score for text in texts for score in model.score(model.encode(text))]
    return Outputs(results, -sum(scores) / max(1, len(scores)))


def _cost(results: Sequence[GenerationResult]) -> Cost:
    tokens = sum(len(result.token_ids) for result in results)
    nfe = sum(result.nfe for result in results)
    return Cost(tokens, nfe, tokens / nfe if nfe else None)
