"""`TwoTower`: both towers in this process, no server needed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from twotower.towers.config import TwoTowerConfig
from twotower.towers.engine import ContextEngine, DenoiserEngine
from twotower.towers.errors import InvalidRequestError
from twotower.towers.generation import generate_blocks
from twotower.towers.link import load_engines
from twotower.towers.params import FinishReason, GenerationParams, Mode
from twotower.towers.protocols import Block
from twotower.towers.tokenizer import Tokenizer, load_tokenizer
from twotower.towers.weights import parse_dtype, resolve_checkpoint

Prompt = str | Sequence[int]
Device = str | torch.device
T = TypeVar("T")


@dataclass(frozen=True)
class GenerationResult:
    """What one prompt gave.

    `token_ids` are the new tokens only, EOS included; `text` is theirs (empty without a
    tokenizer); `nfe` counts denoiser calls, `context_passes` passes of the context tower.
    """

    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    nfe: int
    context_passes: int
    seed: int
    blocks: list[Block]


@dataclass(frozen=True)
class Request:
    """A prompt with its own parameters, for batches that mix them."""

    prompt: Prompt
    params: GenerationParams


class TwoTower:
    """A two-tower model held in this process."""

    def __init__(
        self, context: ContextEngine, denoiser: DenoiserEngine, tokenizer: Tokenizer | None
    ) -> None:
        self.config: TwoTowerConfig = context.tower.config
        self.tokenizer = tokenizer
        self._context = context
        self._denoiser = denoiser
        # An engine belongs to one event loop at a time, and every call brings its own.
        self._calling = threading.Lock()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None = None,
        device: Device | tuple[Device, Device] = "cpu",
        dtype: str = "float32",
    ) -> TwoTower:
        """Loads a folder, a hub id, or (None) the shipped model.

        `device` is one device or a pair (context, denoiser); `dtype` is float32 or bfloat16.
        Raises CheckpointError or ConfigError, naming the tensor or key.
        """
        context_device, denoiser_device = device if isinstance(device, tuple) else (device, device)
        folder = resolve_checkpoint(path)
        context, denoiser = load_engines(
            folder, context_device, denoiser_device, parse_dtype(dtype)
        )
        return cls(context, denoiser, load_tokenizer(folder))

    def generate(
        self,
        prompts: Sequence[Prompt],
        mode: Mode = "mask_diffusion",
        max_tokens: int = 64,
        block_size: int = 16,
        steps_per_block: int = 16,
        confidence_threshold: float = 0.8,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | None = None,
        eos_token_id: int | None = None,
    ) -> list[GenerationResult]:
        """One result per prompt (texts or lists of token ids), all with the same parameters.

        Prompts are decoded together, and each gets what it gets alone. Without a seed each prompt
        draws its own; `eos_token_id` None means that nothing ends a row but max_tokens. Raises
        InvalidRequestError, NumericalError.
        """
        if isinstance(prompts, str):
            raise InvalidRequestError("prompts", prompts, "a list of prompts")
        params = GenerationParams(
            mode,
            max_tokens,
            block_size,
            steps_per_block,
            confidence_threshold,
            temperature,
            top_k,
            top_p,
            min_p,
            seed,
            eos_token_id,
        )
        return self.generate_requests([Request(prompt, params) for prompt in prompts])

    def generate_requests(self, requests: Sequence[Request]) -> list[GenerationResult]:
        """The same for requests that each have their own mode, lengths, seed and limits."""
        rows = []
        for request in requests:
            prompt = self.encode(request.prompt)
            params = request.params.with_seed()
            params.check_row(
                prompt, self.config.vocab_size, self.config.max_position_embeddings, []
            )
            rows.append((prompt, params))
        with self._calling:
            return _run(self._generate_rows(rows))

    def score(self, token_ids: Sequence[int]) -> list[float]:
        """The context tower's natural-log probabilities of tokens 1..n-1, given those before."""
        ids = list(token_ids)
        limits = GenerationParams(mode="ar", max_tokens=1)
        limits.check_row(ids, self.config.vocab_size, self.config.max_position_embeddings + 1, [])
        with self._calling:
            return _run(self._context.score(ids))

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; a list of ids stays as it is."""
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise InvalidRequestError("prompt", prompt, "token ids: the model has no tokenizer")
        return self.tokenizer.encode(prompt)

    async def _generate_rows(
        self, rows: Sequence[tuple[list[int], GenerationParams]]
    ) -> list[GenerationResult]:
        tasks = [
            asyncio.ensure_future(self._generate_row(f"row-{index}", prompt, params))
            for index, (prompt, params) in enumerate(rows)
        ]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _generate_row(
        self, row_id: str, prompt: list[int], params: GenerationParams
    ) -> GenerationResult:
        blocks = [
            block
            async for block in generate_blocks(
                self._context, self._denoiser, row_id, prompt, params
            )
        ]
        token_ids = [token for block in blocks for token in block.token_ids]
        shown = token_ids[:-1] if token_ids[-1:] == [params.eos_token_id] else token_ids
        reason = blocks[-1].finish_reason
        assert reason is not None
        assert params.seed is not None
        return GenerationResult(
            token_ids,
            self.tokenizer.decode(shown) if self.tokenizer else "",
            reason,
            sum(block.nfe for block in blocks),
            sum(block.context_passes for block in blocks),
            params.seed,
            blocks if params.mode == "mask_diffusion" else [_joined(blocks)],
        )


def _joined(blocks: Sequence[Block]) -> Block:
    """All tokens of an autoregressive row as one block, with steps counted over the whole row."""
    token_ids = tuple(token for block in blocks for token in block.token_ids)
    return replace(
        blocks[-1],
        start=blocks[0].start,
        token_ids=token_ids,
        commit_steps=tuple(range(len(token_ids))),
        confidences=tuple(value for block in blocks for value in block.confidences),
        nfe=sum(block.nfe for block in blocks),
        context_passes=sum(block.context_passes for block in blocks),
    )


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine to its end, also for a caller that is inside an event loop (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
