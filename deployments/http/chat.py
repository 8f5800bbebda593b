"""POST /v1/chat/completions, for checkpoints whose tokenizer has a chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from starlette.responses import StreamingResponse

from twotower.deployments.completions.completions import Completion
from twotower.deployments.http.answers import (
    ChatAlternative,
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatTokenLogprob,
)
from twotower.deployments.http.bodies import ChatBody
from twotower.deployments.http.exchange import (
    Exchange,
    begun,
    chunk_events,
    streamed,
    whole_pieces,
)
from twotower.deployments.http.pieces import (
    Piece,
    TokenLogprob,
    TokenTexts,
    output_pieces,
    token_text,
)
from twotower.towers.errors import InvalidRequestError
from twotower.towers.request.number_checks import check_whole
from twotower.towers.request.params import MAX_TOP_LOGPROBS
from twotower.towers.text.fast_tokenizer import REPLACEMENT


async def chat(exchange: Exchange, body: ChatBody) -> ChatAnswer | StreamingResponse:
    """The answer, or the stream of its chunks. Raises InvalidRequestError, NotFoundError, and
    whatever ends a row before its first block."""
    exchange.check_model()
    _check(body)
    completions = await _admitted(exchange, body)
    texts = None
    if body.logprobs:
        texts = [TokenTexts(exchange.service.tokenizer) for _ in completions]
    pieces = await begun(exchange, output_pieces(completions, texts))
    if body.stream:
        choice_of, chunk_of = partial(_delta, exchange), partial(_chunk, exchange)
        usage = partial(exchange.usage, completions)
        events = chunk_events(exchange, pieces, choice_of, chunk_of, usage)
        return streamed(events, pieces, exchange.request_id)
    whole = await whole_pieces(pieces, len(completions))
    return ChatAnswer(
        id=f"chatcmpl-{exchange.request_id}",
        object="chat.completion",
        created=exchange.created,
        model=exchange.model,
        choices=[_choice(exchange, piece) for piece in whole],
        usage=exchange.usage(completions),
    )


def _check(body: ChatBody) -> None:
    if body.response_format is not None and body.response_format.type != "text":
        kind = body.response_format.type
        raise InvalidRequestError("response_format.type", kind, "'text': no other is served")
    body.check_stream_options()
    if body.top_logprobs is not None:
        check_whole("top_logprobs", body.top_logprobs, 0, MAX_TOP_LOGPROBS)
        if not body.logprobs:
            raise InvalidRequestError("top_logprobs", body.top_logprobs, "null without logprobs")
    if None not in (body.max_tokens, body.max_completion_tokens):
        value = body.max_completion_tokens
        raise InvalidRequestError("max_completion_tokens", value, "null beside max_tokens")


async def _admitted(exchange: Exchange, body: ChatBody) -> list[Completion]:
    service = exchange.service
    messages = [{"role": each.role, "content": each.text()} for each in body.messages]
    ids = await service.chat_ids(messages)
    asked = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    tops = body.top_logprobs or 0
    eos = service.model.eos_token_id
    # What the context has room for depends on the other parameters.
    params = body.params(max(1, body.min_tokens or 0) if asked is None else asked, tops, eos)
    if asked is None:
        room = params.most_tokens(len(ids), service.model.max_context)
        params = replace(params, max_tokens=max(1, room))
    return await service.admit(exchange.request(ids, params), exchange.admission.charge)


def _chunk(exchange: Exchange, choices: list[ChatDelta]) -> ChatChunk:
    return ChatChunk(
        id=f"chatcmpl-{exchange.request_id}",
        object="chat.completion.chunk",
        created=exchange.created,
        model=exchange.model,
        choices=choices,
    )


def _choice(exchange: Exchange, piece: Piece) -> ChatChoice:
    choice = ChatChoice(
        index=piece.choice,
        message=ChatMessage(role="assistant", content=piece.text, refusal=None),
        logprobs=_logprobs(exchange, piece.logprobs),
        finish_reason=piece.finish_reason,
        stop_reason=piece.stop_reason,
    )
    if exchange.body.return_token_ids:
        choice.token_ids = list(piece.token_ids)
    return choice


def _delta(exchange: Exchange, piece: Piece, first: bool) -> ChatDelta:
    delta = ChatDelta(
        index=piece.choice,
        delta=ChatMessage(content=piece.text),
        logprobs=_logprobs(exchange, piece.logprobs),
        finish_reason=piece.finish_reason,
        stop_reason=piece.stop_reason,
    )
    if first:
        delta.delta.role = "assistant"
    exchange.add_extras(delta, piece)
    return delta


def _logprobs(exchange: Exchange, tokens: Sequence[TokenLogprob] | None) -> ChatLogprobs | None:
    if tokens is None:
        return None
    tokenizer = exchange.service.tokenizer
    content = []
    for token in tokens:
        assert token.log_prob is not None, "tokens of an output have one"
        tops = [
            _alternative(token_text(tokenizer, other), value) for other, value in token.top or ()
        ]
        own = token_text(tokenizer, token.token_id)
        content.append(
            ChatTokenLogprob(
                token=own,
                logprob=token.log_prob,
                bytes=_bytes(own),
                top_logprobs=tops,
            )
        )
    return ChatLogprobs(content=content)


def _alternative(text: str, value: float) -> ChatAlternative:
    return ChatAlternative(token=text, logprob=value, bytes=_bytes(text))


def _bytes(text: str) -> list[int] | None:
    # Clients join bytes to characters: those of the sign for an unfinished one would be wrong.
    return None if REPLACEMENT in text else list(text.encode())
