"""A model of this process as a Backend: rows of a call share the passes of its engines."""

from __future__ import annotations

from collections.abc import Sequence

from twotower.api import Request, TwoTower
from twotower.call_loop import CallLoop
from twotower.evaluation.backend import Asked, Likelihood, Pair, Scored, Written
from twotower.evaluation.denoiser_likelihood import DenoiserLikelihood
from twotower.results import together
from twotower.towers.checkpoint.weights import parse_device, parse_dtype, resolve_checkpoint
from twotower.towers.engine.load import load_engines
from twotower.towers.engine.options import EngineOptions
from twotower.towers.limits import limit_threads
from twotower.towers.text.tokenizer import load_tokenizer


class InProcess:
    """Both towers of a checkpoint (a folder, a hub id, or None for the shipped model) on one
    device, `rows` rows at a time. Raises CheckpointError, ConfigError, InvalidRequestError."""

    def __init__(
        self,
        path: str | None = None,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        rows: int = 16,
    ) -> None:
        place, working = parse_device(device), parse_dtype(dtype)
        folder = resolve_checkpoint(path)
        limit_threads()
        options = EngineOptions(max_num_seqs=rows)
        self._context, self._denoiser = load_engines(folder, place, place, working, options=options)
        self._model = TwoTower(self._context, self._denoiser, load_tokenizer(folder))
        self._calls = CallLoop()
        self._rows = rows
        config = self._model.config
        self.name = folder.name
        pool = self._context.pool
        room = pool.most_pages * pool.page_tokens
        self.max_context = min(config.max_position_embeddings, room)
        self.eos_token_id = config.eos_token_id

    def encode(self, text: str) -> list[int]:
        """As Backend.encode."""
        return self._model.encode(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        """As Backend.decode."""
        return self._model.decode(token_ids)

    def write(self, asked: Sequence[Asked]) -> list[Written]:
        """As Backend.write."""
        requests = [Request(list(each.prompt), each.params) for each in asked]
        return [
            Written(result.text, len(result.token_ids), result.nfe, result.context_passes)
            for result in self._model.generate_requests(requests)
        ]

    def score(self, rows: Sequence[Sequence[int]]) -> list[Scored]:
        """As Backend.score."""
        calls = [self._context.score(row, top_logprobs=1) for row in rows]
        return [
            Scored(scores.log_probs, [top[0][0] for top in scores.top_log_probs])
            for scores in self._calls.run(together(calls))
        ]

    def bound(self, pairs: Sequence[Pair], samples: int, block_size: int) -> list[Likelihood]:
        """As Bounding.bound."""
        towers = self._context.tower, self._denoiser.tower
        likelihood = DenoiserLikelihood(*towers, samples=samples, block_size=block_size)
        groups = [pairs[at : at + self._rows] for at in range(0, len(pairs), self._rows)]
        return [bound for group in groups for bound in likelihood.bounds(group)]

    def close(self) -> None:
        """As Backend.close."""
