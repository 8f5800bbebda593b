"""`TwoTower`: both towers in this process, no server needed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from twotower.call_loop import CallLoop
from twotower.results import GenerationResult, results_of, together
from twotower.streams import AsyncGenerationStream, GenerationStream
from twotower.towers.checkpoint.checkpoint import ReadProgress
from twotower.towers.checkpoint.weights import (
    parse_device,
    parse_dtype,
    parse_expert_products,
    resolve_checkpoint,
)
from twotower.towers.config.model_config import TwoTowerConfig
from twotower.towers.decoding.draft_times import DraftTimes
from twotower.towers.decoding.generation import generate_blocks
from twotower.towers.decoding.output import Begun, begin_output, commit_blocks
from twotower.towers.engine.context_engine import ContextEngine
from twotower.towers.engine.denoiser_engine import DenoiserEngine
from twotower.towers.engine.load import load_engines
from twotower.towers.errors import InvalidRequestError
from twotower.towers.limits import limit_threads
from twotower.towers.request.modes import Mode
from twotower.towers.request.params import (
    Acceptance,
    CommitRuleName,
    DraftSource,
    GenerationParams,
    Quality,
    TokenSource,
)
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
from twotower.towers.verify import prove_device

Device = str | torch.device
LogitBias = Mapping[int, float] | Sequence[tuple[int, float]]

_PARAMETERS = tuple(field.name for field in fields(GenerationParams))


@dataclass(frozen=True)
class Request:
    """A prompt and its parameters."""

    prompt: Prompt
    params: GenerationParams


class TwoTower:
    """A two-tower model held in this process.

    Calls may overlap and come from any thread: all rows in flight share the towers' passes.
    `draft_times` are what drafts of the denoiser have cost.
    """

    def __init__(
        self, context: ContextEngine, denoiser: DenoiserEngine, tokenizer: Tokenizer | None
    ) -> None:
        self.config: TwoTowerConfig = context.tower.config
        self.tokenizer = tokenizer
        self._context = context
        self._denoiser = denoiser
        self._calls = CallLoop()
        self._row_numbers = itertools.count()
        self.draft_times = DraftTimes()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None = None,
        device: Device | tuple[Device, Device] = "cpu",
        dtype: str = "float32",
        progress: ReadProgress | None = None,
        expert_products: str = "widened",
        self_test: bool | None = None,
        deterministic: bool = False,
    ) -> TwoTower:
        """Loads a folder, a hub id, or (None) the shipped model.

        `device` is one device or a pair (context, denoiser); `dtype` is float32 or bfloat16.
        `progress` gets the bytes read so far and those of both towers, after each tensor. Routed
        experts in 8 bits are multiplied as `expert_products` says: "widened" to `dtype`, or as
        "fp8" with tokens in 8 bits too. With `self_test` (None: on CUDA) recorded passes of a tiny
        model are run on each device first. With `deterministic` a row has the same bits beside any
        others on a GPU too, at some cost of speed; on a CPU it always has. Raises CheckpointError
        or ConfigError, naming the tensor or key; InvalidRequestError for another `dtype` or
        `expert_products`; DeviceError if a device fails the self-test.
        """
        context_device, denoiser_device = device if isinstance(device, tuple) else (device, device)
        places = _fixed(parse_device(context_device)), _fixed(parse_device(denoiser_device))
        working, products = parse_dtype(dtype), parse_expert_products(expert_products)
        folder = resolve_checkpoint(path)
        limit_threads()
        for place in dict.fromkeys(places):
            prove_device(folder, place, working, self_test, products, deterministic)
        context, denoiser = load_engines(
            folder,
            *places,
            working,
            deterministic=deterministic,
            progress=progress,
            expert_products=products,
        )
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
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: LogitBias | None = None,
        top_logprobs: int = 0,
        quality: Quality = "ar",
        draft_source: DraftSource = "any",
        acceptance: Acceptance = "strict",
        mix_ratio: float = 0.3,
        commit_rule: CommitRuleName = "leftmost",
        first_token: TokenSource | None = None,
    ) -> list[GenerationResult]:
        """One result per prompt (texts or token ids), all with the same parameters.

        Ids are lists, arrays or tensors, a prompt's [n] or [1, n]; a [B, n] is B prompts, whose
        rows are taken as they are: ids that pad them are read like any other.
        Prompts are decoded together, and each gets what it gets alone. Without a seed each prompt
        draws its own; `eos_token_id` None means that no token ends a row. A row also ends at one
        of the `stop` strings, which need a tokenizer. GenerationParams says what the others mean.
        Raises InvalidRequestError, NumericalError.
        """
        rows = prompt_rows(prompts)
        params = _params(locals())
        return self.generate_requests([Request(prompt, params) for prompt in rows])

    def stream(
        self,
        prompt: Prompt,
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
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: LogitBias | None = None,
        top_logprobs: int = 0,
        provisional: bool = False,
        quality: Quality = "ar",
        draft_source: DraftSource = "any",
        acceptance: Acceptance = "strict",
        mix_ratio: float = 0.3,
        commit_rule: CommitRuleName = "leftmost",
        first_token: TokenSource | None = None,
        generated_token_ids: TokenIds = (),
    ) -> GenerationStream:
        """Starts a completion of one prompt; iterating over it gives its blocks as they are
        committed.

        Parameters are those of `generate`. With `provisional` every block comes after its drafts,
        a ProvisionalBlock for each denoiser step but the last. `generated_token_ids` are output of
        an earlier stream: this one goes on after them, with the same tokens if it gets the same
        `seed`. Any number of streams and other calls, from any thread, share the towers' passes. A
        stream that is closed, dropped or interrupted by Ctrl-C frees its row within a pass. Raises
        InvalidRequestError; NumericalError while iterating.
        """
        params = _params(locals())
        return GenerationStream(self._calls, self._begun(prompt, params, generated_token_ids))

    def astream(
        self,
        prompt: Prompt,
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
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: LogitBias | None = None,
        top_logprobs: int = 0,
        provisional: bool = False,
        quality: Quality = "ar",
        draft_source: DraftSource = "any",
        acceptance: Acceptance = "strict",
        mix_ratio: float = 0.3,
        commit_rule: CommitRuleName = "leftmost",
        first_token: TokenSource | None = None,
        generated_token_ids: TokenIds = (),
    ) -> AsyncGenerationStream:
        """As `stream`, for `async for`. To be called inside a running event loop, which goes on
        while the towers compute."""
        params = _params(locals())
        return AsyncGenerationStream(self._calls, self._begun(prompt, params, generated_token_ids))

    def generate_requests(self, requests: Sequence[Request]) -> list[GenerationResult]:
        """As `generate`, for requests that each have their own mode, lengths, seed and limits."""
        rows = [self._begun(request.prompt, request.params) for request in requests]
        return self._calls.run(results_of(rows))

    def score(self, token_ids: TokenIds) -> list[float]:
        """The context tower's natural-log probabilities of tokens 1..n-1, given those before.

        `token_ids` are a list, an array or a tensor, [n] or [1, n]. Raises InvalidRequestError.
        """
        ids = id_row("prompt", token_ids)
        limits = GenerationParams(mode="ar", max_tokens=1)
        limits.check_row(ids, self.config.vocab_size, self.config.max_position_embeddings + 1, [])
        return self._calls.run(self._context.score(ids)).log_probs

    def logits(self, prompts: Sequence[Prompt] | Array) -> list[torch.Tensor]:
        """The context tower's logits at every token of each prompt, [n, V] in the model's dtype, on
        the context tower's device: those at a token predict the next one.

        Prompts are those of `generate` and are read together. Raises InvalidRequestError.
        """
        rows = [self.encode(prompt) for prompt in prompt_rows(prompts)]
        limits = GenerationParams(mode="ar", max_tokens=1)
        for ids in rows:
            most = self.config.max_position_embeddings + 1
            limits.check_row(ids, self.config.vocab_size, most, [])
        return self._calls.run(together([self._context.logits(ids) for ids in rows]))

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

    def _begun(
        self, prompt: Prompt, params: GenerationParams, generated_token_ids: TokenIds = ()
    ) -> Begun:
        """A completion that has not been decoded yet. Raises InvalidRequestError."""
        prompt_ids = self.encode(prompt)
        generated = id_row("generated_token_ids", generated_token_ids)
        params = params.with_seed()
        limits = self.config.vocab_size, self.config.max_position_embeddings
        params.check_row(prompt_ids, *limits, [])
        check_ids("generated_token_ids", generated, self.config.vocab_size)
        text, log = begin_output(self.tokenizer, params, len(prompt_ids), generated)
        if log.finish_reason is None:
            params.check_row(prompt_ids, *limits, generated)
        row_id = f"row-{next(self._row_numbers)}"
        blocks = generate_blocks(
            self._context,
            self._denoiser,
            row_id,
            prompt_ids,
            params,
            generated,
            draft_times=self.draft_times,
        )
        return commit_blocks(blocks, text, log), text, log, params


def _params(arguments: Mapping[str, Any]) -> GenerationParams:
    """The parameters among a call's arguments by name; None for no list. Raises
    InvalidRequestError."""
    given = {name: arguments[name] for name in _PARAMETERS if name in arguments}
    empty = {name: () for name in ("stop", "logit_bias") if given[name] is None}
    return GenerationParams(**{**given, **empty})


def _fixed(device: torch.device) -> torch.device:
    """The device by its number: `cuda` alone means another GPU in each thread."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
