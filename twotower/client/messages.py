"""Converts between protobuf messages and the plain values of a client."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import grpc

from twotower.client.wire_values import (
    checked_bias,
    checked_ids,
    checked_scalars,
    checked_text,
)
from twotower.protos.refusals import client_status, retry_after_of
from twotower.protos.v1 import generation_pb2 as pb
from twotower.towers.errors import TwoTowerError
from twotower.towers.request.results import (
    DraftedBy,
    ProvisionalBlock,
    TextBlock,
    TopLogProbs,
    Usage,
)
from twotower.towers.request.token_ids import PROMPT, Prompt, TokenIds, text_list

# Biases by token id, or pairs of both.
Bias = Mapping[int, float] | Sequence[tuple[int, float]]


class ServiceError(TwoTowerError):
    """The service refused or failed a call; `code` is its gRPC status.

    `retry_after_s` is the service's hint when to try again, in seconds, if it gave one.
    """

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        self.code = code
        self.details = details
        self.retry_after_s = retry_after_of(details)
        super().__init__(f"{code.name}: {details}")

    def __reduce__(self) -> tuple[type[ServiceError], tuple[grpc.StatusCode, str]]:
        return type(self), (self.code, self.details)


@dataclass(frozen=True)
class Score:
    """The scored tokens, and natural-log probabilities of all but the first.

    `top_log_probs` are in place of each of these the most probable tokens as (id, log-probability),
    as many as were asked for, the best first; empty if none were.
    """

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    top_log_probs: tuple[TopLogProbs, ...] = ()


@dataclass(frozen=True)
class ModelInfo:
    """Model, limits and modes of a service; `fingerprint` changes with the checkpoint's content."""

    name: str
    version: str
    vocab_size: int
    max_context: int
    modes: tuple[str, ...]
    eos_token_id: int | None
    has_tokenizer: bool
    layer_pattern: str
    dtype: str
    fingerprint: str


def generate_request(
    prompt: Prompt,
    stop: Sequence[str],
    generated_token_ids: TokenIds,
    request_id: str,
    scalars: dict[str, Any],
    logit_bias: Bias | None = None,
) -> pb.GenerateRequest:
    """The request of a completion; scalars that are None stay unset.

    Raises InvalidRequestError for what a message cannot carry.
    """
    checked = checked_scalars(pb.SamplingParams.DESCRIPTOR, scalars)
    bias = None if logit_bias is None else checked_bias(logit_bias)
    return pb.GenerateRequest(
        request_id=checked_text("request_id", request_id),
        **_input_of("prompt", prompt),
        sampling_params=pb.SamplingParams(stop=_texts(stop), logit_bias=bias, **checked),
        generated_token_ids=checked_ids("generated_token_ids", generated_token_ids),
    )


def score_request(text: Prompt, top_logprobs: int = 0) -> pb.ScoreRequest:
    """The request to score a text or token ids. Raises InvalidRequestError."""
    given = {"top_logprobs": top_logprobs or None}
    checked = checked_scalars(pb.ScoreRequest.DESCRIPTOR, given)
    return pb.ScoreRequest(**_input_of("text", text), **checked)


def tokenize_request(text: str) -> pb.TokenizeRequest:
    """The request for the ids of a text. Raises InvalidRequestError."""
    return pb.TokenizeRequest(text=checked_text("text", text))


def detokenize_request(token_ids: TokenIds) -> pb.DetokenizeRequest:
    """The request for the text of ids. Raises InvalidRequestError."""
    return pb.DetokenizeRequest(token_ids=checked_ids("token_ids", token_ids))


def text_block(block: pb.Block, index: int) -> TextBlock:
    """A received block, numbered within the whole completion."""
    return TextBlock(
        index,
        block.start,
        tuple(block.token_ids),
        block.text,
        tuple(block.commit_steps),
        tuple(block.confidences),
        tuple(block.log_probs),
        _tops(block.top_log_probs),
        cast("DraftedBy", block.drafted_by),
    )


def provisional_block(draft: pb.ProvisionalBlock) -> ProvisionalBlock:
    """A received draft."""
    return ProvisionalBlock(
        draft.start,
        draft.step,
        tuple(draft.token_ids),
        tuple(draft.masked),
        tuple(draft.confidences),
    )


def usage_of(usage: pb.Usage) -> Usage:
    """A received usage."""
    return Usage(
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.nfe,
        usage.context_passes,
        usage.cached_tokens,
        usage.accepted_tokens,
        usage.drafted_tokens,
        usage.lookup_accepted_tokens,
        usage.lookup_drafted_tokens,
    )


def score_of(response: pb.ScoreResponse) -> Score:
    """A received score."""
    tops = _tops(response.top_log_probs)
    return Score(tuple(response.token_ids), tuple(response.log_probs), tops)


def model_info_of(info: pb.ModelInfo) -> ModelInfo:
    """A received description."""
    return ModelInfo(
        name=info.name,
        version=info.version,
        vocab_size=info.vocab_size,
        max_context=info.max_context,
        modes=tuple(info.modes),
        eos_token_id=info.eos_token_id if info.HasField("eos_token_id") else None,
        has_tokenizer=info.has_tokenizer,
        layer_pattern=info.layer_pattern,
        fingerprint=info.fingerprint,
        dtype=info.dtype,
    )


def service_error(error: Any) -> ServiceError:
    """The ServiceError of a gRPC error."""
    return ServiceError(*client_status(error.code(), error.details() or "no details"))


def _input_of(field: str, prompt: Prompt) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"text": checked_text(field, prompt)}
    return {"tokens": pb.TokenIds(ids=checked_ids(field, prompt, PROMPT))}


def _tops(positions: Iterable[pb.TopLogProbs]) -> tuple[TopLogProbs, ...]:
    return tuple(tuple(zip(each.token_ids, each.log_probs, strict=True)) for each in positions)


def _texts(stop: Sequence[str]) -> list[str]:
    given = text_list("stop", stop)
    return [checked_text(f"stop[{index}]", text) for index, text in enumerate(given)]
