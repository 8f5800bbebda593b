"""Both towers in this process, which decode a point's rows together and score them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from twotower.api import Request, TwoTower
from twotower.results import GenerationResult, together
from twotower.sweep.metrics import Row
from twotower.sweep.prompts import SweepPrompt
from twotower.sweep.scoring import Scorer
from twotower.towers.checkpoint.checkpoint import ReadProgress
from twotower.towers.checkpoint.weights import parse_dtype
from twotower.towers.engine.load import load_engines
from twotower.towers.engine.options import EngineOptions
from twotower.towers.engine.prefill import prefill_pieces
from twotower.towers.request.params import GenerationParams
from twotower.towers.text.tokenizer import load_tokenizer, text_ids


@dataclass(frozen=True)
class Likelihood:
    """Natural-log probabilities of an output's tokens under the context tower, and those of the
    most probable token at each of their positions."""

    log_probs: tuple[float, ...]
    best_log_probs: tuple[float, ...]


def token_ids(folder: Path, prompts: Sequence[SweepPrompt]) -> list[list[int]]:
    """Token ids of prompts by a checkpoint's tokenizer. Raises InvalidRequestError."""
    tokenizer = load_tokenizer(folder)
    return [text_ids(tokenizer, "prompt", prompt.text) for prompt in prompts]


class Towers:
    """A model with room for `batch` rows of `max_context` tokens at a time.

    Without a prefix cache: the second point would read prompts faster than the first.
    """

    def __init__(
        self,
        folder: Path,
        device: str,
        dtype: str,
        batch: int,
        max_context: int,
        progress: ReadProgress | None = None,
    ) -> None:
        options = EngineOptions(max_num_seqs=batch, max_context=max_context, prefix_cache_mib=0)
        place = torch.device(device)
        self.context, self.denoiser = load_engines(
            folder, place, place, parse_dtype(dtype), options=options, progress=progress
        )
        self.model = TwoTower(self.context, self.denoiser, load_tokenizer(folder))
        self._batch = batch

    def decode(
        self, prompts: Sequence[Sequence[int]], params: GenerationParams
    ) -> tuple[list[GenerationResult], float]:
        """Results and the seconds that all of them took; prompt i has seed `params.seed` + i."""
        seed = params.seed or 0
        requests = [
            Request(list(ids), replace(params, seed=seed + index))
            for index, ids in enumerate(prompts)
        ]
        begun = time.perf_counter()
        results = self.model.generate_requests(requests)
        return results, time.perf_counter() - begun

    def likelihoods(
        self, prompts: Sequence[Sequence[int]], results: Sequence[GenerationResult]
    ) -> list[Likelihood]:
        """The context tower's natural-log probabilities of each output's tokens, and those of the
        most probable token at each."""
        pairs = zip(prompts, results, strict=True)
        return asyncio.run(self._likelihoods([(ids, result.token_ids) for ids, result in pairs]))

    async def _likelihoods(
        self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[Likelihood]:
        """Those of prompts and outputs, as many at a time as there is room for; they share
        passes."""
        room = asyncio.Semaphore(self._batch)

        async def scored(prompt: Sequence[int], output: Sequence[int]) -> Likelihood:
            async with room:
                scores = await self.context.score([*prompt, *output], top_logprobs=1)
            first = len(scores.log_probs) - len(output)
            best = tuple(top[0][1] for top in scores.top_log_probs[first:])
            return Likelihood(tuple(scores.log_probs[first:]), best)

        return await together([scored(*row) for row in rows])

    def reading_passes(self, prompt: Sequence[int], params: GenerationParams) -> int:
        """Passes of the context tower that read a prompt."""
        return len(prefill_pieces(prompt, (), params, self.context.prefill_chunk))


def rows_of(
    towers: Towers,
    prompts: Sequence[SweepPrompt],
    ids_of_prompts: Sequence[Sequence[int]],
    results: Sequence[GenerationResult],
    params: GenerationParams,
    scorers: Mapping[str, Scorer],
) -> list[Row]:
    """Results as rows, scored by the context tower and by each task."""
    likelihoods = towers.likelihoods(ids_of_prompts, results)
    reading = [towers.reading_passes(ids, params) for ids in ids_of_prompts]
    return [
        Row(
            token_ids=tuple(result.token_ids),
            text=result.text,
            finish_reason=result.finish_reason,
            log_probs=likelihood.log_probs,
            best_log_probs=likelihood.best_log_probs,
            nfe=result.nfe,
            context_passes=result.context_passes - passes,
            accepted_tokens=result.accepted_tokens,
            drafted_tokens=result.drafted_tokens,
            lookup_accepted_tokens=result.lookup_accepted_tokens,
            lookup_drafted_tokens=result.lookup_drafted_tokens,
            scores={
                name: float(scorer(prompt.text, result.text, prompt.reference))
                for name, scorer in scorers.items()
            },
        )
        for prompt, result, likelihood, passes in zip(
            prompts, results, likelihoods, reading, strict=True
        )
    ]
