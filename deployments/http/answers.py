"""Answers of the HTTP front, in OpenAI's shapes; what is ours stands under `twotower`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel

from twotower.towers.request.params import FinishReason
from twotower.towers.request.results import DraftedBy, Usage


class TwoTowerUsage(BaseModel):
    """Cost beside tokens: denoiser passes (`nfe`), passes of the context tower, and in verified
    and auto the drafted tokens and those that were accepted, of which the last two are the part of
    lookups."""

    nfe: int
    context_passes: int
    cached_tokens: int
    accepted_tokens: int
    drafted_tokens: int
    lookup_accepted_tokens: int
    lookup_drafted_tokens: int


class PromptTokensDetails(BaseModel):
    """Prompt tokens that came from the prefix cache."""

    cached_tokens: int


class UsageAnswer(BaseModel):
    """Cost of a request, all of its choices together; its prompts count once each."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    twotower: TwoTowerUsage


class CompletionLogprobs(BaseModel):
    """Log-probabilities of a text's tokens; a prompt's first token has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class ProvisionalAnswer(BaseModel):
    """The draft of a block after a denoiser step that was not its last.

    `tokens` are the texts of its tokens; where `masked`, that of the present prediction, or null
    where it is not known.
    """

    start: int
    step: int
    token_ids: list[int]
    tokens: list[str | None]
    masked: list[bool]
    confidences: list[float]


class BlockAnswer(BaseModel):
    """A committed block: its first position, its ids, and for each the step that committed it and
    its probability then; and who drafted it last, lookup, denoiser or nobody (empty)."""

    start: int
    token_ids: list[int]
    tokens: list[str | None]
    commit_steps: list[int]
    confidences: list[float]
    nfe: int
    context_passes: int
    drafted_by: DraftedBy


class ChoiceExtra(BaseModel):
    """What a chunk carries beside OpenAI's fields."""

    seed: int | None = None
    block: BlockAnswer | None = None
    provisional: ProvisionalAnswer | None = None


class Choice(BaseModel):
    """A completion, or in a stream what a block adds to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    twotower: ChoiceExtra | None = None


class CompletionAnswer(BaseModel):
    """Answer of POST /v1/completions, and a chunk of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: UsageAnswer | None = None


class ChatAlternative(BaseModel):
    """A token with its log-probability, and its text's bytes; null for a token that is only a part
    of a character, of which the tokenizer tells no bytes."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(ChatAlternative):
    """A token of a chat's answer, with the likeliest at its place."""

    top_logprobs: list[ChatAlternative]


class ChatLogprobs(BaseModel):
    """Log-probabilities of a chat's answer."""

    content: list[ChatTokenLogprob]


class ChatMessage(BaseModel):
    """A message of the model, or in a stream what a block adds to it."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None


class ChatChoice(BaseModel):
    """An answer of a chat."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | None = None
    token_ids: list[int] | None = None


class ChatDelta(BaseModel):
    """What a block adds to an answer of a chat."""

    index: int
    delta: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | None = None
    token_ids: list[int] | None = None
    twotower: ChoiceExtra | None = None


class ChatAnswer(BaseModel):
    """Answer of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageAnswer


class ChatChunk(BaseModel):
    """A chunk of a chat's stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatDelta]
    usage: UsageAnswer | None = None


class ModelAnswer(BaseModel):
    """A model that is served; `fingerprint` changes with its checkpoint's content."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "twotower"
    fingerprint: str
    max_model_len: int
    modes: list[str]
    vocab_size: int
    has_tokenizer: bool


class ModelList(BaseModel):
    """All models that are served: one."""

    object: Literal["list"] = "list"
    data: list[ModelAnswer]


class TokenizeAnswer(BaseModel):
    """The ids of a text."""

    count: int
    max_model_len: int
    tokens: list[int]


class TokenizerAnswer(BaseModel):
    """The tokenizer's special tokens, and its chat template if it has one."""

    eos_token: str | None
    bos_token: str | None
    pad_token: str | None
    chat_template: str | None


class DetokenizeAnswer(BaseModel):
    """The text of ids."""

    prompt: str


class VersionAnswer(BaseModel):
    """Version of the serving package."""

    version: str


class ErrorBody(BaseModel):
    """What went wrong: `param` is the field, if one is to blame."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """An error in OpenAI's shape."""

    error: ErrorBody


def usage_answer(usages: Sequence[Usage], num_prompts: int, choices: int = 1) -> UsageAnswer:
    """The cost of a request from that of its completions, `choices` after each other of each of
    its `num_prompts` prompts."""
    firsts = usages[::choices][:num_prompts]
    prompt = sum(usage.prompt_tokens for usage in firsts)
    completion = sum(usage.completion_tokens for usage in usages)
    cached = sum(usage.cached_tokens for usage in firsts)
    return UsageAnswer(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
        twotower=TwoTowerUsage(
            nfe=sum(usage.nfe for usage in usages),
            context_passes=sum(usage.context_passes for usage in usages),
            cached_tokens=cached,
            accepted_tokens=sum(usage.accepted_tokens for usage in usages),
            drafted_tokens=sum(usage.drafted_tokens for usage in usages),
            lookup_accepted_tokens=sum(usage.lookup_accepted_tokens for usage in usages),
            lookup_drafted_tokens=sum(usage.lookup_drafted_tokens for usage in usages),
        ),
    )
