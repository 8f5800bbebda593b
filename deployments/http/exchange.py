"""What both kinds of completions do alike: names, streams of events, usage, extras."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TypeVar

from pydantic import BaseModel
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from twotower.deployments.access.limits import Admission
from twotower.deployments.completions.completions import Completion, Completions
from twotower.deployments.completions.requests import CompletionRequest
from twotower.deployments.http.answers import (
    BlockAnswer,
    ChatChunk,
    ChatDelta,
    Choice,
    ChoiceExtra,
    CompletionAnswer,
    ProvisionalAnswer,
    UsageAnswer,
    usage_answer,
)
from twotower.deployments.http.bodies import SamplingBody
from twotower.deployments.http.errors import NotFoundError, answer_of
from twotower.deployments.http.pieces import Piece, joined_piece, token_text
from twotower.towers.request.params import GenerationParams
from twotower.towers.request.results import Usage

C = TypeVar("C", Choice, ChatDelta)
Chunk = TypeVar("Chunk", CompletionAnswer, ChatChunk)
DONE = b"data: [DONE]\n\n"
# A proxy in front must not collect events.
_STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


@dataclass(frozen=True)
class Exchange:
    """A request by HTTP: its name, the service, and what was asked for. `admission` is its place
    among its caller's requests, which it has until its answer has ended, and `traceparent` its W3C
    trace context."""

    service: Completions
    body: SamplingBody
    request_id: str
    admission: Admission
    traceparent: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    arrived: float = field(default_factory=time.monotonic)

    def request(self, ids: list[int], params: GenerationParams) -> CompletionRequest:
        """The request for the completions of a prompt."""
        return CompletionRequest(
            self.request_id,
            ids,
            params,
            n=self.choices,
            caller=self.admission.name,
            traceparent=self.traceparent,
            arrived=self.arrived,
        )

    def check_model(self) -> None:
        """Raises NotFoundError for a model that is not served."""
        check_model(self.service, self.body.model)

    @property
    def model(self) -> str:
        """Name of the served model."""
        return self.service.model.name

    @property
    def choices(self) -> int:
        """Completions of each prompt."""
        return 1 if self.body.n is None else self.body.n

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        options = self.body.stream_options
        return options is not None and bool(options.include_usage)

    def usage(self, completions: Sequence[Completion], spare: Sequence[Usage] = ()) -> UsageAnswer:
        """Cost of the completions, or of prompts that were read without one."""
        usages = [completion.log.usage for completion in completions] or list(spare)
        return usage_answer(usages, len(usages) // self.choices, self.choices)

    def add_extras(self, choice: Choice | ChatDelta, piece: Piece) -> None:
        """Adds what was asked for beside OpenAI's fields: ids, drafts, details of blocks."""
        if self.body.return_token_ids:
            choice.token_ids = list(piece.token_ids)
        extra = self._extra(piece)
        if extra is not None:
            choice.twotower = extra

    def _extra(self, piece: Piece) -> ChoiceExtra | None:
        """Draft or block of a piece, if the stream is to carry them."""
        if not self.body.provisional:
            return None
        if piece.draft is not None:
            draft = piece.draft
            return ChoiceExtra(
                provisional=ProvisionalAnswer(
                    start=draft.start,
                    step=draft.step,
                    token_ids=list(draft.token_ids),
                    tokens=self._texts(draft.token_ids, draft.confidences),
                    masked=list(draft.masked),
                    confidences=list(draft.confidences),
                )
            )
        if piece.block is None:
            return None
        block = piece.block
        return ChoiceExtra(
            block=BlockAnswer(
                start=block.start,
                token_ids=list(block.token_ids),
                tokens=self._texts(block.token_ids, block.confidences),
                commit_steps=list(block.commit_steps),
                confidences=list(block.confidences),
                nfe=block.nfe,
                context_passes=block.context_passes,
                drafted_by=block.drafted_by,
            )
        )

    def _texts(self, token_ids: Sequence[int], known: Sequence[float]) -> list[str | None]:
        """Texts of tokens one by one; None where nothing is known yet."""
        tokenizer = self.service.tokenizer
        pairs = zip(token_ids, known, strict=True)
        return [token_text(tokenizer, token) if sure else None for token, sure in pairs]


def check_model(service: Completions, name: str | None) -> None:
    """Raises NotFoundError for the name of a model that is not served."""
    if name is not None and name != service.model.name:
        text = f"model: got {name[:80]!r}, expected {service.model.name!r}"
        raise NotFoundError(text, "model", "model_not_found")


async def chunk_events(
    exchange: Exchange,
    pieces: Begun,
    choice_of: Callable[[Piece, bool], C],
    chunk_of: Callable[[list[C]], Chunk],
    usage: Callable[[], UsageAnswer],
) -> AsyncGenerator[bytes, None]:
    """The events of a stream: a chunk for each piece, one of `usage` if it was asked for, the end.

    `choice_of` is told whether a piece is its choice's first.
    """
    told: set[int] = set()
    async with aclosing(pieces):
        async for piece in pieces:
            chunk = chunk_of([choice_of(piece, piece.choice not in told)])
            told.add(piece.choice)
            if exchange.includes_usage:
                chunk.usage = None
            yield event(chunk)
    if exchange.includes_usage:
        last = chunk_of([])
        last.usage = usage()
        yield event(last)
    yield DONE


async def whole_pieces(pieces: Begun, count: int) -> list[Piece]:
    """All pieces of each of `count` choices as one, without drafts."""
    parts: list[list[Piece]] = [[] for _ in range(count)]
    async with aclosing(pieces):
        async for piece in pieces:
            if piece.draft is None:
                parts[piece.choice].append(piece)
    return [joined_piece(each) for each in parts]


def event(chunk: BaseModel) -> bytes:
    """A chunk as a server-sent event; fields that were not set are left out."""
    return b"data: " + chunk.model_dump_json(exclude_unset=True).encode() + b"\n\n"


class Begun:
    """Pieces of which the `first` is there. Closing them, begun to be read or not, ends what makes
    them."""

    def __init__(self, first: Piece | None, rest: AsyncGenerator[Piece, None]) -> None:
        self._first = first
        self._rest = rest

    def __aiter__(self) -> Begun:
        return self

    async def __anext__(self) -> Piece:
        if self._first is None:
            return await anext(self._rest)
        first, self._first = self._first, None
        return first

    async def aclose(self) -> None:
        """Frees the rows, and the caller's place."""
        await self._rest.aclose()


async def begun(exchange: Exchange, pieces: AsyncGenerator[Piece, None]) -> Begun:
    """The same pieces once the first is there: until then an error is an answer of its own.

    The caller's place is free again when they have ended or are closed.
    """

    async def held() -> AsyncGenerator[Piece, None]:
        with exchange.admission:
            async with aclosing(pieces):
                async for piece in pieces:
                    yield piece

    whole = held()
    return Begun(await anext(whole, None), whole)


class _Stream(StreamingResponse):
    """Sends events, and closes them and their pieces however that ends.

    A generator that has not been begun, or that waits while its event is sent, runs nothing when
    its reader is cancelled: the rows would be free only when Python collects it.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], pieces: Begun) -> None:
        super().__init__(events, media_type="text/event-stream", headers=_STREAM_HEADERS)
        self._events = events
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
            await self._pieces.aclose()


def streamed(
    events: AsyncGenerator[bytes, None], pieces: Begun, request_id: str
) -> StreamingResponse:
    """The answer that sends these events, which are made of these pieces."""
    return _Stream(guarded(events, request_id), pieces)


async def guarded(
    events: AsyncGenerator[bytes, None], request_id: str
) -> AsyncGenerator[bytes, None]:
    """The events; an error after the first ends them as an event of its own, without DONE."""
    async with aclosing(events):
        try:
            async for each in events:
                yield each
        except Exception as error:
            _, answer = answer_of(error, request_id)
            yield b"data: " + answer.model_dump_json().encode() + b"\n\n"
