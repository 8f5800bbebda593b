"""One completion at a time without a server, block by block: what `twotower generate` runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

from twotower.towers.checkpoint.weights import parse_device, parse_dtype
from twotower.towers.decoding.commit_log import CommitLog
from twotower.towers.decoding.generation import generate_blocks
from twotower.towers.decoding.output_text import OutputText
from twotower.towers.engine.load import load_engines
from twotower.towers.errors import InvalidRequestError
from twotower.towers.limits import limit_threads
from twotower.towers.request.params import GenerationParams
from twotower.towers.text.tokenizer import load_tokenizer, text_ids


class InProcessModel:
    """Both towers in this process. Raises CheckpointError, ConfigError on construction."""

    def __init__(self, folder: Path, device: str, dtype: str) -> None:
        place = parse_device(device)
        limit_threads()
        self._context, self._denoiser = load_engines(folder, place, place, parse_dtype(dtype))
        self._tokenizer = load_tokenizer(folder)

    def stream(
        self, prompt: str, params: GenerationParams, *, ignore_eos: bool = False
    ) -> InProcessStream:
        """Starts a completion that ends at the model's end-of-text token, unless `ignore_eos`.

        Raises InvalidRequestError.
        """
        if self._tokenizer is None:
            raise InvalidRequestError("prompt", prompt, "a model that has a tokenizer")
        config = self._context.tower.config
        token_ids = text_ids(self._tokenizer, "prompt", prompt)
        eos = None if ignore_eos else config.eos_token_id
        params = replace(params, eos_token_id=eos).with_seed()
        params.check_row(token_ids, config.vocab_size, config.max_position_embeddings, [])
        log, log_probs = CommitLog(len(token_ids), ()), list[float]()
        pieces = self._pieces(token_ids, params, log, log_probs)
        return InProcessStream(pieces, log, log_probs, params)

    async def _pieces(
        self, prompt: list[int], params: GenerationParams, log: CommitLog, log_probs: list[float]
    ) -> AsyncGenerator[str, None]:
        text = OutputText(self._tokenizer, params)
        blocks = generate_blocks(self._context, self._denoiser, "row", prompt, params)
        async with aclosing(blocks):
            async for block in blocks:
                cut, shown = text.take(block)
                log.append(cut)
                log_probs.extend(cut.log_probs)
                yield shown
                if text.matched_stop is not None:
                    return


class InProcessStream:
    """Iterates over pieces of text; `log` and `seed` tell what they cost and how to repeat them.

    `log_probs` are those of the tokens in `log`.
    """

    def __init__(
        self,
        pieces: AsyncGenerator[str, None],
        log: CommitLog,
        log_probs: list[float],
        params: GenerationParams,
    ) -> None:
        self._pieces = pieces
        self.log = log
        self.log_probs = log_probs
        self.seed = params.seed

    def __iter__(self) -> Iterator[str]:
        with asyncio.Runner() as runner:
            try:
                while True:
                    yield runner.run(_next(self._pieces))
            except StopAsyncIteration:
                return
            finally:
                runner.run(self._pieces.aclose())


async def _next(pieces: AsyncGenerator[str, None]) -> str:
    return await anext(pieces)
