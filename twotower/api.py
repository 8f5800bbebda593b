"""`TwoTower`: both towers in this process, no server needed."""

from __future__ import annotations

import asyncio
import itertools
import weakref
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Unpack

import torch

from twotower.loop_thread import LoopThread
from twotower.streams import AsyncLocalStream, LocalStream
from twotower.towers.checkpoint.weights import parse_device, parse_dtype, resolve_checkpoint
from twotower.towers.config.model_config import TwoTowerConfig
from twotower.towers.decoding.generation import generate_blocks
from twotower.towers.decoding.output import Output
from twotower.towers.decoding.services import Block
from twotower.towers.engine.context_engine import ContextEngine
from twotower.towers.engine.denoiser_engine import DenoiserEngine
from twotower.towers.engine.load import load_engines
from twotower.towers.errors import InvalidRequestError
from twotower.towers.limits import limit_threads
from twotower.towers.request.modes import FinishReason, Mode
from twotower.towers.request.params import GenerationParams, Sampling
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
        self._row_numbers = itertools.count()
        # An engine belongs to one event loop; calls from any thread or loop share its passes.
        self._loop = LoopThread()
        weakref.finalize(self, self._loop.close)

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
        return self._loop.run(self._generate_rows([self._row(request) for request in requests]))

    def stream(
        self, prompt: Prompt, *, generated_token_ids: TokenIds = (), **sampling: Unpack[Sampling]
    ) -> LocalStream:
        """The blocks of one completion as they are committed, the same that a service streams.

        `sampling` are the fields of GenerationParams. `generated_token_ids` are those of an earlier
        stream of the same prompt, parameters and seed, with which this one goes on. Reading starts
        the work; between two blocks nothing is computed ahead. Streams and other calls of the model
        may overlap, also in one thread. Raises InvalidRequestError.
        """
        return self.stream_request(_request(prompt, sampling), generated_token_ids)

    def astream(
        self, prompt: Prompt, *, generated_token_ids: TokenIds = (), **sampling: Unpack[Sampling]
    ) -> AsyncLocalStream:
        """As `stream`, for `async for` on any event loop."""
        return self.astream_request(_request(prompt, sampling), generated_token_ids)

    def stream_request(self, request: Request, generated_token_ids: TokenIds = ()) -> LocalStream:
        """As `stream`, for a request."""
        return LocalStream(self, self._loop, *self._begin(request, generated_token_ids))

    def astream_request(
        self, request: Request, generated_token_ids: TokenIds = ()
    ) -> AsyncLocalStream:
        """As `astream`, for a request."""
        return AsyncLocalStream(self, self._loop, *self._begin(request, generated_token_ids))

    def score(self, token_ids: TokenIds) -> list[float]:
        """The context tower's natural-log probabilities of tokens 1..n-1, given those before.

        `token_ids` are a list, an array or a tensor, [n] or [1, n]. Raises InvalidRequestError.
        """
        ids = id_row("prompt", token_ids)
        limits = GenerationParams(mode="ar", max_tokens=1)
        limits.check_row(ids, self.config.vocab_size, self.config.max_position_embeddings + 1, [])
        return self._loop.run(self._context.score(ids))

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

    def _row(self, request: Request, generated: Sequence[int] = ()) -> _Row:
        """A request within the model's limits, with its output so far."""
        prompt, params = self.encode(request.prompt), request.params.with_seed()
        vocab_size, max_context = self.config.vocab_size, self.config.max_position_embeddings
        params.check_row(prompt, vocab_size, max_context, [])
        check_ids("generated_token_ids", generated, vocab_size)
        output = Output(self.tokenizer, params, len(prompt), generated)
        if output.finish_reason is None:
            params.check_row(prompt, vocab_size, max_context, list(generated))
        return _Row(prompt, params, output)

    def _begin(
        self, request: Request, generated_token_ids: TokenIds
    ) -> tuple[Output, AsyncGenerator[Block, None], int]:
        generated = id_row("generated_token_ids", generated_token_ids)
        row = self._row(request, generated)
        assert row.params.seed is not None
        return row.output, self._blocks(row, generated), row.params.seed

    def _blocks(self, row: _Row, generated: Sequence[int] = ()) -> AsyncGenerator[Block, None]:
        row_id = f"row-{next(self._row_numbers)}"
        towers = self._context, self._denoiser
        return generate_blocks(*towers, row_id, row.prompt, row.params, generated)

    async def _generate_rows(self, rows: Sequence[_Row]) -> list[GenerationResult]:
        tasks = [asyncio.ensure_future(self._generate_row(row)) for row in rows]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _generate_row(self, row: _Row) -> GenerationResult:
        blocks, text = list[Block](), ""
        async with aclosing(row.output.commit(self._blocks(row))) as committed:
            async for block, piece in committed:
                blocks.append(block)
                text += piece
        usage, params = row.output.log.usage(), row.params
        assert row.output.finish_reason is not None
        assert params.seed is not None
        return GenerationResult(
            token_ids=list(row.output.log.token_ids),
            text=text,
            finish_reason=row.output.finish_reason,
            nfe=usage.nfe,
            context_passes=usage.context_passes,
            seed=params.seed,
            blocks=blocks if params.traits.by_block else [_joined(row.output, blocks)],
            matched_stop=row.output.matched_stop,
            cached_tokens=usage.cached_tokens,
            accepted_tokens=usage.accepted_tokens,
            drafted_tokens=usage.drafted_tokens,
            log_probs=[value for block in blocks for value in block.log_probs],
        )


class _Row(NamedTuple):
    """A checked request: its token ids, its parameters with a seed, and its output."""

    prompt: list[int]
    params: GenerationParams
    output: Output


def _request(prompt: Prompt, sampling: Sampling) -> Request:
    given = {name: value for name, value in sampling.items() if name != "stop"}
    stop = sampling.get("stop")
    params = GenerationParams(**given, stop=() if stop is None else stop)  # type: ignore[arg-type]
    return Request(prompt, params)


def _joined(output: Output, blocks: Sequence[Block]) -> Block:
    """The tokens of a row that commits one at a time as one block, with one step per token."""
    log = output.log
    return Block(
        start=log.prompt_tokens,
        token_ids=log.token_ids,
        commit_steps=tuple(range(len(log.token_ids))),
        confidences=tuple(value for block in blocks for value in block.confidences),
        nfe=log.nfe,
        context_passes=log.context_passes,
        finish_reason=log.finish_reason,
        log_probs=tuple(value for block in blocks for value in block.log_probs),
        accepted_tokens=log.accepted_tokens,
        drafted_tokens=log.drafted_tokens,
        cached_tokens=log.cached_tokens,
        eased=blocks[-1].eased,
    )
