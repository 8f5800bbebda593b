"""Both towers in this process, which decode a point's rows together and score them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from twotower.api import Request, TwoTower
from twotower.results import GenerationResult
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

    def log_probs(
        self, prompts: Sequence[Sequence[int]], results: Sequence[GenerationResult]
    ) -> list[list[float]]:
        """The context tower's natural-log probabilities of each output's tokens."""
        texts = [[*ids, *result.token_ids] for ids, result in zip(prompts, results, strict=True)]
        # Calls from several threads share passes.
        with ThreadPoolExecutor(self._batch) as pool:
            scores = list(pool.map(self.model.score, texts))
        return [
            score[len(score) - len(result.token_ids) :]
            for score, result in zip(scores, results, strict=True)
        ]

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
    log_probs = towers.log_probs(ids_of_prompts, results)
    reading = [towers.reading_passes(ids, params) for ids in ids_of_prompts]
    return [
        Row(
            token_ids=tuple(result.token_ids),
            text=result.text,
            finish_reason=result.finish_reason,
            log_probs=tuple(values),
            nfe=result.nfe,
            context_passes=result.context_passes - passes,
            accepted_tokens=result.accepted_tokens,
            drafted_tokens=result.drafted_tokens,
            scores={
                name: float(scorer(prompt.text, result.text, prompt.reference))
                for name, scorer in scorers.items()
            },
        )
        for prompt, result, values, passes in zip(prompts, results, log_probs, reading, strict=True)
    ]
