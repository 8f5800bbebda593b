"""The life of a request behind every front: admission, its rows, commits, scores, texts.

A front (gRPC, HTTP, KServe) decodes what a client sends into a CompletionRequest, has it admitted
here and encodes what comes back. Limits, defaults and errors are decided here, once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

import twotower
from twotower.deployments.completions.chat import load_chat_template
from twotower.deployments.completions.counters import RouterLoad
from twotower.deployments.completions.encoding import TextReader
from twotower.deployments.completions.requests import CompletionRequest, Input
from twotower.deployments.completions.status import status_name
from twotower.deployments.config import ServiceConfig
from twotower.deployments.pair.tower_pair import Job
from twotower.deployments.routing import pairs as table
from twotower.deployments.routing.attempts import Attempts, PairClient, attempt_id
from twotower.deployments.routing.policy import Room
from twotower.deployments.routing.retry import RetryPolicy
from twotower.deployments.telemetry.logs import REQUEST_ID
from twotower.deployments.telemetry.open import open_recorder
from twotower.deployments.telemetry.record import CompletionRecord, Origin
from twotower.towers.checkpoint.fingerprint import fingerprint
from twotower.towers.checkpoint.weights import resolve_checkpoint
from twotower.towers.config.model_config import TwoTowerConfig
from twotower.towers.decoding.commit_log import CommitLog
from twotower.towers.decoding.output import Output, begin_output, commit_blocks
from twotower.towers.decoding.output_text import OutputText
from twotower.towers.decoding.services import Block, Scores
from twotower.towers.errors import InvalidRequestError
from twotower.towers.request.modes import Mode, served_modes
from twotower.towers.request.number_checks import check_whole
from twotower.towers.request.params import MAX_TOP_LOGPROBS, GenerationParams
from twotower.towers.request.token_ids import check_ids
from twotower.towers.text.text_limit import longest_token_bytes
from twotower.towers.text.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger("ray.serve")

READY_TIMEOUT_S = 5.0
SPECIAL_TOKENS = ("eos_token", "bos_token", "pad_token")
# Of a message, beside its content: about what a template writes around it.
_MESSAGE_BYTES = 32
# Takes a number of tokens that a caller has used.
Charge = Callable[[int], None]


@dataclass(frozen=True)
class ServedModel:
    """What is served, and within which limits. `max_context` counts prompt and output together,
    output rounded up to whole blocks; ids are below `vocab_size`. `fingerprint` changes with the
    checkpoint's content."""

    name: str
    fingerprint: str
    version: str
    vocab_size: int
    max_context: int
    modes: tuple[Mode, ...]
    eos_token_id: int | None
    has_tokenizer: bool
    layer_pattern: str
    dtype: str


class Completion:
    """A row that has been admitted and not begun: number `index` of its request.

    `log` and `text` are those of its output, filled while `blocks` is read. `charge` is told of
    the tokens that it costs its caller.
    """

    def __init__(
        self,
        attempts: Attempts,
        load: RouterLoad,
        job: Job,
        text: OutputText,
        log: CommitLog,
        index: int,
        charge: Charge,
        record: CompletionRecord,
    ) -> None:
        self.index = index
        self.prompt = job.prompt
        self.params = job.params
        self.text = text
        self.log = log
        self._attempts = attempts
        self._load = load
        self._job = job
        self._charge = charge
        self._record = record

    @property
    def seed(self) -> int:
        """The given or drawn seed of the row."""
        assert self.params.seed is not None
        return self.params.seed

    async def blocks(self) -> Output:
        """The committed blocks with the text that each settles, and drafts if they were asked for.
        Closing it frees the row."""
        began = False
        self._load.began(self.log.usage)
        self._charge(self.log.prompt_tokens)
        try:
            with self._record as record:
                source = self._attempts.blocks(self._job, self.log, record.served_by)
                blocks = commit_blocks(source, self.text, self.log)
                async with aclosing(blocks) as items:
                    async for block, text in items:
                        if isinstance(block, Block):
                            record.committed(block)
                            self._load.committed(block, first=not began)
                            self._charge(len(block.token_ids))
                            began = True
                        yield block, text
        finally:
            self._load.ended(began=began)


class Completions:
    """Admits requests within the model's limits and runs them on a deployment of pairs."""

    def __init__(self, config: ServiceConfig, pairs: Any) -> None:
        folder = resolve_checkpoint(config.model)
        model = TwoTowerConfig.from_file(folder / "config.json")
        self.tokenizer: Tokenizer | None = load_tokenizer(folder)
        self.chat_template = load_chat_template(folder)
        self.max_message = config.message_bytes()
        self._pairs = PairClient(pairs)
        retry = RetryPolicy(config.resume_timeout_s, config.max_attempts)
        room = Room.of(config.max_num_seqs, config.num_routers)
        self._attempts = Attempts(self._pairs, retry, room)
        self._load = RouterLoad()
        self._from_zero = config.autoscaling is not None and config.autoscaling.min_pairs == 0
        max_context = min(config.max_context, model.max_position_embeddings)
        self.reader = TextReader(self.tokenizer, longest_token_bytes(folder), max_context)
        self.special_tokens = {
            name: self._spelled(getattr(model, f"{name}_id")) for name in SPECIAL_TOKENS
        }
        self._has_denoiser = config.placement != "ar_only"
        self.model = ServedModel(
            name=config.shown_name(),
            fingerprint=fingerprint(folder),
            version=twotower.__version__,
            vocab_size=model.vocab_size,
            max_context=max_context,
            modes=served_modes(with_denoiser=self._has_denoiser),
            eos_token_id=model.eos_token_id,
            has_tokenizer=self.tokenizer is not None,
            layer_pattern=model.layer_pattern,
            dtype=config.dtype,
        )
        self.recorder = open_recorder(config, status_name)

    async def admit(
        self,
        request: CompletionRequest,
        charge: Charge = lambda _tokens: None,
        first_index: int = 0,
    ) -> list[Completion]:
        """The completions of a request, none of them begun, numbered from `first_index`.

        Sizes are checked before anything else. Raises InvalidRequestError, and QueueFullError if
        too many texts wait to be encoded.
        """
        REQUEST_ID.set(request.request_id)
        self.recorder.metrics.let_in(request.caller)
        self.reader.check_count("generated_token_ids", len(request.generated))
        self._check_served(request.params)
        prompt = await self.token_ids("prompt", request.prompt)
        generated = request.generated
        check = partial(
            request.params.check_row, prompt, self.model.vocab_size, self.model.max_context
        )
        check([])
        check_ids("generated_token_ids", generated, self.model.vocab_size)
        return [
            await self._begin(tuple(prompt), params, request, index, charge)
            for index, params in enumerate(request.choices(), first_index)
        ]

    def _check_served(self, params: GenerationParams) -> None:
        """Raises InvalidRequestError for what needs a tower that this deployment does not have."""
        modes = self.model.modes
        if params.mode not in modes:
            raise InvalidRequestError("mode", params.mode, f"{', '.join(modes)} alone")
        if params.needs_denoiser and not self._has_denoiser:
            limit = "any or lookup: this deployment has no denoiser tower"
            raise InvalidRequestError("draft_source", params.draft_source, limit)

    def _spelled(self, token_id: int | None) -> str | None:
        if token_id is None or self.tokenizer is None:
            return None
        return self.tokenizer.token(token_id)

    async def _begin(
        self,
        prompt: tuple[int, ...],
        params: GenerationParams,
        request: CompletionRequest,
        index: int,
        charge: Charge,
    ) -> Completion:
        generated = request.generated
        begin = partial(begin_output, self.tokenizer, params, len(prompt), generated)
        text, log = await self.reader.run(_work_of(params, generated), begin)
        if generated and log.finish_reason is None:
            # Without any the row was checked with its request.
            limits = self.model.vocab_size, self.model.max_context
            params.check_row(list(prompt), *limits, list(generated))
        job = Job(attempt_id(), prompt, generated, params)
        origin = Origin(request.request_id, request.caller, request.traceparent, request.arrived)
        record = self.recorder.completion(origin, params.mode, log)
        return Completion(self._attempts, self._load, job, text, log, index, charge, record)

    async def token_ids(self, field: str, given: Input) -> list[int]:
        """The ids of a text or of ids, not yet checked against the vocabulary.

        Raises InvalidRequestError for text without a tokenizer and for more than the model takes,
        QueueFullError if too many texts wait to be read.
        """
        if isinstance(given, str):
            return await self.reader.encode(field, given)
        self.reader.check_count(field, len(given))
        return given

    async def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text; of one that is a special token and nothing else, that token's.

        Raises InvalidRequestError, QueueFullError.
        """
        special = None if self.tokenizer is None else self.tokenizer.special_id(text)
        if special is not None:
            return [special]
        return await self.reader.encode("prompt", text, add_special_tokens)

    async def chat_ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The ids of a conversation. Raises InvalidRequestError, also without a template and for
        more than the model takes, QueueFullError if too many texts wait to be read."""
        if self.chat_template is None:
            limit = "a model whose tokenizer has a chat template; use completions"
            raise InvalidRequestError("messages", f"{len(messages)} messages", limit)
        size = sum(len(message["content"].encode()) for message in messages)
        self.reader.check_size("messages", size)
        # The template writes something for each message, be it empty.
        size += _MESSAGE_BYTES * len(messages)
        ids = await self.reader.run(size, partial(self.chat_template.token_ids, messages))
        self.reader.check_count("messages", len(ids))
        return ids

    def check_ids(self, field: str, token_ids: Sequence[int]) -> None:
        """Raises InvalidRequestError for no id at all, and for one that the model does not have."""
        if not token_ids:
            raise InvalidRequestError(field, [], "at least 1 token")
        check_ids(field, token_ids, self.model.vocab_size)

    async def score(
        self,
        field: str,
        token_ids: Sequence[int],
        top_logprobs: int = 0,
        charge: Charge = lambda _tokens: None,
    ) -> Scores:
        """Log-probabilities of tokens 1 to n-1 under the context tower, with alternatives.

        Raises InvalidRequestError.
        """
        check_whole("top_logprobs", top_logprobs, 0, MAX_TOP_LOGPROBS)
        self.check_ids(field, token_ids)
        charge(len(token_ids))
        return await self._attempts.score(token_ids, top_logprobs)

    async def decode(self, field: str, token_ids: Sequence[int]) -> str:
        """The text of ids, without special tokens. Raises InvalidRequestError, QueueFullError."""
        self.reader.check_count(field, len(token_ids))
        check_ids(field, token_ids, self.model.vocab_size)
        if self.tokenizer is None:
            raise InvalidRequestError(field, "ids", "none, as this model has no tokenizer")
        decode = partial(self.tokenizer.decode, list(token_ids))
        return await self.reader.run(len(token_ids) * 4, decode)

    def stats(self) -> dict[str, Any]:
        """Counters of this router, and what each pair has reported last."""
        reports = table.PAIRS.reports()
        return {
            "model": self.model.name,
            "version": self.model.version,
            "uptime_s": self._load.uptime_s,
            "clock_s": time.monotonic(),
            "router": self._load.counters.report(),
            "pairs": [{"pair": pair, "towers": towers} for pair, towers in reports.items()],
        }

    async def is_ready(self) -> bool:
        """Whether a request would be served now."""
        if self._from_zero:
            # Requests may wait for the first pair; a ping would start it.
            return True
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                await self._pairs.ping()
        except Exception as error:
            logger.info("not ready: %s", type(error).__name__)
            return False
        return True


async def merged(completions: Sequence[Completion]) -> AsyncGenerator[tuple[Completion, Any], None]:
    """The items of several completions as they come, each with its completion.

    Whatever ends the iteration frees all rows; an error of one ends the others.
    """
    if len(completions) == 1:
        async with aclosing(completions[0].blocks()) as items:
            async for item in items:
                yield completions[0], item
        return
    # A place for each: no row runs further ahead of a slow reader than that.
    queue: asyncio.Queue[tuple[Completion, Any]] = asyncio.Queue(len(completions))
    tasks = [asyncio.ensure_future(_pour(each, queue)) for each in completions]
    left = len(tasks)
    try:
        while left:
            completion, item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield completion, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pour(completion: Completion, queue: asyncio.Queue[tuple[Completion, Any]]) -> None:
    """Puts a completion's items, then None, or the error that ended it."""
    task = asyncio.current_task()
    assert task is not None
    end: BaseException | None = None
    try:
        async with aclosing(completion.blocks()) as items:
            async for item in items:
                await queue.put((completion, item))
    except (Exception, asyncio.CancelledError) as error:
        if task.cancelling():
            raise
        # Ray says of a call that was ended elsewhere that it was cancelled.
        end = error
    await queue.put((completion, end))


def _work_of(params: GenerationParams, generated: tuple[int, ...]) -> int:
    """Bytes of a prompt that take as long to encode as the text of a resumed output takes to
    decode; with stop strings it is decoded token by token."""
    return len(generated) * (32 if params.stop else 4)
