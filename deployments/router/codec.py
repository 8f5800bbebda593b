"""Converts between protobuf messages and the dataclasses of towers and completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from google.protobuf.message import Message

from twotower.deployments.completions.requests import CompletionRequest, Input, request_id_of
from twotower.protos.refusals import too_long
from twotower.protos.v1 import generation_pb2 as pb
from twotower.towers.decoding.commit_log import CommitLog
from twotower.towers.decoding.services import Block, ProvisionalBlock, Scores
from twotower.towers.request.params import SAMPLING_PARAMETERS, GenerationParams, check_stop_count

if TYPE_CHECKING:
    # It brings Ray, which messages can be read without.
    from twotower.deployments.completions.completions import Completion, ServedModel

# Fields that are no scalars.
_LISTS = ("stop", "logit_bias")
_OPTIONAL_SCALARS = tuple(name for name in SAMPLING_PARAMETERS if name not in _LISTS)


def completion_request(
    message: pb.GenerateRequest, eos_token_id: int | None, max_bytes: int, name: str = ""
) -> CompletionRequest:
    """The request of a message; `name` is its own if it brings none, drawn if that is empty too.

    Raises InvalidRequestError, for one that is too long first.
    """
    check_size(message, max_bytes)
    return CompletionRequest(
        request_id_of(message.request_id or name),
        input_of(message, "prompt"),
        params_of(message.sampling_params, eos_token_id),
        tuple(message.generated_token_ids),
        message.n if message.HasField("n") else 1,
    )


def params_of(message: pb.SamplingParams, eos_token_id: int | None) -> GenerationParams:
    """Sampling parameters with every unset field at its default and a seed.

    Raises InvalidRequestError.
    """
    # Before the strings are copied.
    check_stop_count(len(message.stop))
    given = {name: getattr(message, name) for name in _OPTIONAL_SCALARS if message.HasField(name)}
    eos = None if message.ignore_eos else eos_token_id
    bias = tuple(message.logit_bias.items())
    return GenerationParams(
        **given, eos_token_id=eos, stop=tuple(message.stop), logit_bias=bias
    ).with_seed()


def input_of(message: pb.GenerateRequest | pb.ScoreRequest, oneof: str) -> Input:
    """The text or the ids of a oneof of both; no ids if neither is set."""
    return message.text if message.WhichOneof(oneof) == "text" else list(message.tokens.ids)


def check_size(message: Message, max_bytes: int) -> None:
    """Raises InvalidRequestError for a message that is too long as a whole."""
    size = message.ByteSize()
    if size > max_bytes:
        raise too_long(size, max_bytes)


def started_event(completion: Completion, request_id: str) -> pb.GenerateResponse:
    """The first message of a completion."""
    started = pb.Started(
        request_id=request_id, seed=completion.seed, prompt_tokens=len(completion.prompt)
    )
    return pb.GenerateResponse(started=started, choice=completion.index)


def block_event(
    completion: Completion, block: Block, text: str, *, log_probs: bool
) -> pb.GenerateResponse:
    """The message of a completion's last block, with log-probabilities if they were asked for, and
    with the steps and threshold that were used if the request has floors."""
    log, asked = completion.log, completion.params
    message = pb.Block(
        index=log.num_blocks - 1,
        start=block.start,
        token_ids=block.token_ids,
        text=text,
        commit_steps=block.commit_steps,
        confidences=block.confidences,
        log_probs=block.log_probs if log_probs else (),
        top_log_probs=_tops(block.top_log_probs),
        usage=usage_of(log),
        drafted_by=block.drafted_by,
    )
    if asked.may_be_eased:
        served = log.served(asked)
        message.steps_per_block = served.steps_per_block
        message.confidence_threshold = served.confidence_threshold
    return pb.GenerateResponse(block=message, choice=completion.index)


def provisional_event(completion: Completion, draft: ProvisionalBlock) -> pb.GenerateResponse:
    """The message of a draft."""
    message = pb.ProvisionalBlock(
        start=draft.start,
        step=draft.step,
        token_ids=draft.token_ids,
        masked=draft.masked,
        confidences=draft.confidences,
    )
    return pb.GenerateResponse(provisional=message, choice=completion.index)


def complete_event(completion: Completion) -> pb.GenerateResponse:
    """The last message of a completion, whose log has a finish reason."""
    log = completion.log
    complete = pb.Complete(
        finish_reason=log.finish_reason,
        usage=usage_of(log),
        matched_stop=completion.text.matched_stop,
    )
    return pb.GenerateResponse(complete=complete, choice=completion.index)


def usage_of(log: CommitLog) -> pb.Usage:
    """Cost of the blocks of a log."""
    return pb.Usage(**vars(log.usage))


def score_response(token_ids: Sequence[int], scores: Scores) -> pb.ScoreResponse:
    """The answer of Score."""
    return pb.ScoreResponse(
        token_ids=token_ids,
        log_probs=scores.log_probs,
        top_log_probs=_tops(scores.top_log_probs),
    )


def model_info(model: ServedModel) -> pb.ModelInfo:
    """The answer of GetModelInfo."""
    return pb.ModelInfo(**asdict(model))


def _tops(
    positions: Sequence[Sequence[tuple[int, float]]],
) -> list[pb.TopLogProbs]:
    return [
        pb.TopLogProbs(token_ids=[token for token, _ in top], log_probs=[value for _, value in top])
        for top in positions
    ]
