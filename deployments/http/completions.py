"""POST /v1/completions: prompts in, texts out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial

from starlette.responses import StreamingResponse

from twotower.deployments.completions.completions import Completion
from twotower.deployments.completions.requests import MAX_CHOICES, Input
from twotower.deployments.http.answers import (
    Choice,
    ChoiceExtra,
    CompletionAnswer,
    CompletionLogprobs,
)
from twotower.deployments.http.bodies import (
    DEFAULT_MAX_TOKENS,
    MAX_COMPLETION_LOGPROBS,
    CompletionBody,
)
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
    prompt_logprobs,
    token_text,
)
from twotower.towers.errors import InvalidRequestError
from twotower.towers.request.number_checks import check_whole
from twotower.towers.request.results import Usage

# Of a text that is read in the time in which a token's text is found.
_SPLIT_BYTES = 32


@dataclass(frozen=True)
class _Asked:
    """A body whose fields have been checked against each other. `tops` is None without
    log-probabilities, otherwise the number of alternatives."""

    prompts: list[Input]
    max_tokens: int
    tops: int | None
    echo: bool


@dataclass
class _Prompt:
    """A prompt as ids, with its text and log-probabilities if those are to be sent."""

    token_ids: list[int]
    text: str = ""
    logprobs: list[TokenLogprob] | None = None
    length: int = field(init=False)

    def __post_init__(self) -> None:
        self.length = len(self.text)


async def complete(
    exchange: Exchange, body: CompletionBody
) -> CompletionAnswer | StreamingResponse:
    """The answer, or the stream of its chunks. Raises InvalidRequestError, NotFoundError, and
    whatever ends a row before its first block."""
    exchange.check_model()
    asked = _asked(body, exchange.choices)
    prompts, completions = await _admitted(exchange, body, asked)
    pieces = await begun(exchange, _pieces(exchange, asked, prompts, completions))
    usage = partial(exchange.usage, completions, _spare(exchange, asked, prompts))

    def choice_of(piece: Piece, first: bool) -> Choice:
        choice = _choice(exchange, asked, piece)
        if first:
            _introduce(exchange, choice, prompts, completions)
        return choice

    if body.stream:
        chunk_of = partial(_answer, exchange)
        events = chunk_events(exchange, pieces, choice_of, chunk_of, usage)
        return streamed(events, pieces, exchange.request_id)
    whole = await whole_pieces(pieces, len(prompts) * exchange.choices)
    answer = _answer(exchange, [choice_of(piece, True) for piece in whole])
    answer.usage = usage()
    return answer


def _asked(body: CompletionBody, choices: int) -> _Asked:
    if body.best_of not in (None, 1):
        raise InvalidRequestError("best_of", body.best_of, "1 or null: every choice is sent")
    if body.suffix:
        raise InvalidRequestError("suffix", body.suffix, "null: text goes on at its end only")
    body.check_stream_options()
    if body.logprobs is not None:
        check_whole("logprobs", body.logprobs, 0, MAX_COMPLETION_LOGPROBS)
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    check_whole("max_tokens", max_tokens, 0)
    prompts = _prompts(body)
    check_whole("n", choices, 1, MAX_CHOICES)
    if len(prompts) * choices > MAX_CHOICES:
        count = f"{len(prompts)} prompts with {choices} choices"
        raise InvalidRequestError("prompt", count, f"at most {MAX_CHOICES} completions a request")
    return _Asked(prompts, max_tokens, body.logprobs, bool(body.echo))


def _prompts(body: CompletionBody) -> list[Input]:
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise InvalidRequestError("prompt", [], "at least 1 token")
    if isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


async def _admitted(
    exchange: Exchange, body: CompletionBody, asked: _Asked
) -> tuple[list[_Prompt], list[Completion]]:
    """The prompts, and the completions of all of them in order; none if no token is asked for."""
    service = exchange.service
    params = body.params(max(1, asked.max_tokens), asked.tops or 0, service.model.eos_token_id)
    prompts, completions = [], []
    for index, given in enumerate(asked.prompts):
        ids = await service.token_ids("prompt", given)
        if asked.max_tokens:
            request = exchange.request(ids, params)
            first = index * exchange.choices
            completions += await service.admit(request, exchange.admission.charge, first)
        else:
            service.check_ids("prompt", ids)
        text = given if isinstance(given, str) else ""
        if asked.echo and not isinstance(given, str) and service.tokenizer is not None:
            text = await service.decode("prompt", ids)
        prompts.append(_Prompt(ids, text if asked.echo else ""))
    return prompts, completions


async def _pieces(
    exchange: Exchange, asked: _Asked, prompts: Sequence[_Prompt], completions: Sequence[Completion]
) -> AsyncGenerator[Piece, None]:
    """Echoed prompts, then the output."""
    choices = exchange.choices
    if asked.echo and asked.tops is not None:
        await _score(exchange, asked.tops, prompts)
    texts = None
    if asked.tops is not None:
        tokenizer = exchange.service.tokenizer
        texts = [
            TokenTexts(tokenizer, prompts[each.index // choices].length) for each in completions
        ]
    output = output_pieces(completions, texts)
    async with aclosing(output):
        # The first block, or what refuses the row, before anything is sent.
        first = await anext(output, None) if completions else None
        for index in range(len(prompts) * choices if asked.echo or not completions else 0):
            prompt = prompts[index // choices]
            end = None if completions else "length"
            yield Piece(index, prompt.text, (), prompt.logprobs, end)  # type: ignore[arg-type]
        if first is not None:
            yield first
        async for piece in output:
            yield piece


async def _score(exchange: Exchange, tops: int, prompts: Sequence[_Prompt]) -> None:
    """Adds the log-probabilities of each prompt."""
    service, charge = exchange.service, exchange.admission.charge
    try:
        # An error of one ends the others.
        async with asyncio.TaskGroup() as group:
            scoring = [
                group.create_task(service.score("prompt", prompt.token_ids, tops, charge))
                for prompt in prompts
            ]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    for prompt, found in zip(prompts, (task.result() for task in scoring), strict=True):
        texts = TokenTexts(service.tokenizer)
        split = partial(prompt_logprobs, texts, prompt.token_ids, found)
        # Token by token: a long prompt takes seconds.
        size = len(prompt.token_ids) * _SPLIT_BYTES
        prompt.logprobs = await service.reader.run(size, split)


def _spare(exchange: Exchange, asked: _Asked, prompts: Sequence[_Prompt]) -> list[Usage]:
    """Usage of a request that asks for no token."""
    if asked.max_tokens:
        return []
    return [
        Usage(len(prompt.token_ids), 0, 0, 0, 0, 0, 0)
        for prompt in prompts
        for _ in range(exchange.choices)
    ]


def _answer(exchange: Exchange, choices: list[Choice]) -> CompletionAnswer:
    return CompletionAnswer(
        id=f"cmpl-{exchange.request_id}",
        object="text_completion",
        created=exchange.created,
        model=exchange.model,
        choices=choices,
    )


def _choice(exchange: Exchange, asked: _Asked, piece: Piece) -> Choice:
    logprobs = None
    if piece.logprobs is not None and asked.tops is not None:
        logprobs = _completion_logprobs(exchange, piece.logprobs)
    choice = Choice(
        index=piece.choice,
        text=piece.text,
        logprobs=logprobs,
        finish_reason=piece.finish_reason,
        stop_reason=piece.stop_reason,
    )
    exchange.add_extras(choice, piece)
    return choice


def _introduce(
    exchange: Exchange,
    choice: Choice,
    prompts: Sequence[_Prompt],
    completions: Sequence[Completion],
) -> None:
    """Adds what a choice says once: its seed, and the prompt's ids if they were asked for."""
    if completions:
        extra = choice.twotower or ChoiceExtra()
        extra.seed = completions[choice.index].seed
        choice.twotower = extra
    if exchange.body.return_token_ids:
        choice.prompt_token_ids = prompts[choice.index // exchange.choices].token_ids


def _completion_logprobs(exchange: Exchange, tokens: Sequence[TokenLogprob]) -> CompletionLogprobs:
    return CompletionLogprobs(
        tokens=[token.text for token in tokens],
        token_logprobs=[token.log_prob for token in tokens],
        top_logprobs=[_alternatives(exchange, token) for token in tokens],
        text_offset=[token.offset for token in tokens],
    )


def _alternatives(exchange: Exchange, token: TokenLogprob) -> dict[str, float] | None:
    """Log-probabilities by text, the token's own among them; of tokens with one text the
    likeliest."""
    if token.log_prob is None or token.top is None:
        return None
    tokenizer = exchange.service.tokenizer
    found = {token_text(tokenizer, token.token_id): token.log_prob}
    for other, value in token.top:
        text = token_text(tokenizer, other)
        found[text] = max(value, found.get(text, value))
    return found
