"""`TwoTower`: both towers in this process, no server needed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from twotower.interrupts import run_to_end
from twotower.towers.checkpoint.weights import parse_device, parse_dtype, resolve_checkpoint
from twotower.towers.config.model_config import TwoTowerConfig
from twotower.towers.decoding.generation import generate_blocks
from twotower.towers.decoding.output_text import OutputText
from twotower.towers.decoding.services import Block
from twotower.towers.engine.context_engine import ContextEngine
from twotower.towers.engine.denoiser_engine import DenoiserEngine
from twotower.towers.engine.load import load_engines
from twotower.towers.errors import InvalidRequestError
from twotower.towers.limits import limit_threads
from twotower.towers.request.params import FinishReason, GenerationParams, Mode
from twotower.towers.request.token_ids import (
    PROMPT,
    Array,
    Prompt,
    TokenIds,
    check_ids,
    id_row,
    prompt_rows,
)
from twotower.towers.text.tokenizer import Tokenizer, load_tokenizer, text_ids

Device = str | torch.device


@dataclass(frozen=True)
class GenerationResult:
    """What one prompt gave.

    `token_ids` are the new tokens only, EOS and those of a stop string included; `text` is theirs
    without either (empty without a tokenizer). `log_probs` are the natural-log probabilities of
    the tokens: the denoiser's in mask_diffusion and mock_ar, the context tower's in ar and
    verified. `matched_stop` is the stop string that ended the output, if one has. `nfe` counts
    denoiser calls, `context_passes` passes of the context tower. `cached_tokens` of the prompt
    came from the prefix cache; in verified, `accepted_tokens` of `drafted_tokens` were accepted.
    """

    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    nfe: int
    context_passes: int
    seed: int
    blocks: list[Block]
    matched_stop: str | None
    cached_tokens: int
    accepted_tokens: int
    drafted_tokens: int
    log_probs: list[float]


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
        Raises CheckpointError or ConfigError, naming the tensor or key; InvalidRequestError for
        another `dtype`.
        """
        context_device, denoiser_device = device if isinstance(device, tuple) else (device, device)
        places = parse_device(context_device), parse_device(denoiser_device)
        working = parse_dtype(dtype)
        folder = resolve_checkpoint(path)
        limit_threads()
        context, denoiser = load_engines(folder, *places, working)
        return cls(context, denoiser, load_tokenizer(folder))

    def generate(
        self,
        prompts: Sequence[Prompt] | Array,
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
        draft_steps: int = 1,
        min_tokens: int = 0,
        stop: Sequence[str] | None = None,
    ) -> list[GenerationResult]:
        """One result per prompt (texts or token ids), all with the same parameters.

        Ids are lists, arrays or tensors, a prompt's [n] or [1, n]; a [B, n] is B prompts, whose
        rows are taken as they are: ids that pad them are read like any other.
        Prompts are decoded together, and each gets what it gets alone. Without a seed each prompt
        draws its own; `eos_token_id` None means that no token ends a row. A row also ends at one
        of the `stop` strings, which need a tokenizer. Raises InvalidRequestError, NumericalError.
        """
        rows = prompt_rows(prompts)
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
            draft_steps,
            min_tokens,
            () if stop is None else stop,  # type: ignore[arg-type]  # params check and keep a tuple
        )
        return self.generate_requests([Request(prompt, params) for prompt in rows])

    def generate_requests(self, requests: Sequence[Request]) -> list[GenerationResult]:
        """The same for requests that each have their own mode, lengths, seed and limits."""
        rows = []
        for request in requests:
            prompt = self.encode(request.prompt)
            params = request.params.with_seed()
            params.check_row(
                prompt, self.config.vocab_size, self.config.max_position_embeddings, []
            )
            rows.append((prompt, params, OutputText(self.tokenizer, params)))
        return run_to_end(self._generate_rows(rows), self._calling)

    def score(self, token_ids: TokenIds) -> list[float]:
        """The context tower's natural-log probabilities of tokens 1..n-1, given those before.

        `token_ids` are a list, an array or a tensor, [n] or [1, n]. Raises InvalidRequestError.
        """
        ids = id_row("prompt", token_ids)
        limits = GenerationParams(mode="ar", max_tokens=1)
        limits.check_row(ids, self.config.vocab_size, self.config.max_position_embeddings + 1, [])
        return run_to_end(self._context.score(ids), self._calling)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt: of a text those that the tokenizer gives, with the special tokens
        that it puts around one; ids as a list. Raises InvalidRequestError."""
        if not isinstance(prompt, str):
            return id_row("prompt", prompt, PROMPT)
        return text_ids(self.tokenizer, "prompt", prompt)

    def decode(self, token_ids: TokenIds) -> str:
        """The text of token ids ([n] or [1, n]), without special tokens. Raises
        InvalidRequestError for an id that the model does not have, or without a tokenizer."""
        ids = id_row("token_ids", token_ids)
        check_ids("token_ids", ids, self.config.vocab_size)
        if self.tokenizer is None:
            raise InvalidRequestError("token_ids", ids, "none, as this model has no tokenizer")
        return self.tokenizer.decode(ids)

    async def _generate_rows(
        self, rows: Sequence[tuple[list[int], GenerationParams, OutputText]]
    ) -> list[GenerationResult]:
        tasks = [
            asyncio.ensure_future(self._generate_row(f"row-{index}", *row))
            for index, row in enumerate(rows)
        ]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _generate_row(
        self, row_id: str, prompt: list[int], params: GenerationParams, output: OutputText
    ) -> GenerationResult:
        blocks, text = [], ""
        stream = generate_blocks(self._context, self._denoiser, row_id, prompt, params)
        async with aclosing(stream):
            async for block in stream:
                cut, shown = output.take(block)
                blocks.append(cut)
                text += shown
                if output.matched_stop is not None:
                    break
        whole = _joined(blocks)
        assert whole.finish_reason is not None
        assert params.seed is not None
        return GenerationResult(
            list(whole.token_ids),
            text,
            whole.finish_reason,
            whole.nfe,
            whole.context_passes,
            params.seed,
            [whole] if params.mode in ("ar", "mock_ar") else blocks,
            output.matched_stop,
            whole.cached_tokens,
            whole.accepted_tokens,
            whole.drafted_tokens,
            list(whole.log_probs),
        )


def _joined(blocks: Sequence[Block]) -> Block:
    """All tokens of a row as one block, with one step per token over the whole row."""
    token_ids = tuple(token for block in blocks for token in block.token_ids)
    return replace(
        blocks[-1],
        start=blocks[0].start,
        token_ids=token_ids,
        commit_steps=tuple(range(len(token_ids))),
        confidences=tuple(value for block in blocks for value in block.confidences),
        log_probs=tuple(value for block in blocks for value in block.log_probs),
        nfe=sum(block.nfe for block in blocks),
        context_passes=sum(block.context_passes for block in blocks),
        accepted_tokens=sum(block.accepted_tokens for block in blocks),
        drafted_tokens=sum(block.drafted_tokens for block in blocks),
        cached_tokens=sum(block.cached_tokens for block in blocks),
    )
