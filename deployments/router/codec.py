"""Converts between protobuf messages and the dataclasses of towers and router."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import asdict

from twotower.deployments.pair.tower_pair import Job
from twotower.deployments.router.encoding import TextReader
from twotower.protos.refusals import too_long
from twotower.protos.v1 import generation_pb2 as pb
from twotower.towers.config.model_config import TwoTowerConfig
from twotower.towers.decoding.commit_log import CommitLog
from twotower.towers.decoding.services import Block
from twotower.towers.errors import InvalidRequestError
from twotower.towers.request.params import SAMPLING_PARAMETERS, GenerationParams, check_stop_count

MAX_REQUEST_ID = 128
_REQUEST_ID = re.compile(rf"[!-~]{{1,{MAX_REQUEST_ID}}}")
_OPTIONAL_SCALARS = tuple(
    name
    for name in SAMPLING_PARAMETERS
    if name != "stop" and name in pb.SamplingParams.DESCRIPTOR.fields_by_name
)


def request_id_of(given: str) -> str:
    """The client's name for a request, or a drawn one. Raises InvalidRequestError."""
    if not given:
        return secrets.token_hex(8)
    if not _REQUEST_ID.fullmatch(given):
        limit = f"at most {MAX_REQUEST_ID} printable ASCII characters without spaces"
        raise InvalidRequestError("request_id", given, limit)
    return given


def params_of(message: pb.SamplingParams, eos_token_id: int | None) -> GenerationParams:
    """Sampling parameters with every unset field at its default and a seed.

    Raises InvalidRequestError.
    """
    # Before the strings are copied.
    check_stop_count(len(message.stop))
    given = {name: getattr(message, name) for name in _OPTIONAL_SCALARS if message.HasField(name)}
    eos = None if message.ignore_eos else eos_token_id
    return GenerationParams(**given, eos_token_id=eos, stop=tuple(message.stop)).with_seed()


async def token_ids_of(
    message: pb.GenerateRequest | pb.ScoreRequest, field: str, reader: TextReader
) -> list[int]:
    """The ids of a oneof of text and tokens; empty if neither is set or the text is empty.

    Raises InvalidRequestError for text without a tokenizer and for more than the model takes,
    QueueFullError if too many texts wait to be read.
    """
    if message.WhichOneof(field) == "text":
        return await reader.encode(field, message.text)
    reader.check_count(field, len(message.tokens.ids))
    return list(message.tokens.ids)


def check_size(message: pb.GenerateRequest | pb.ScoreRequest, max_bytes: int) -> None:
    """Raises InvalidRequestError for a message that is too long as a whole."""
    size = message.ByteSize()
    if size > max_bytes:
        raise too_long(size, max_bytes)


def started_event(job: Job, request_id: str) -> pb.GenerateResponse:
    """The first message of a stream."""
    return pb.GenerateResponse(
        started=pb.Started(
            request_id=request_id, seed=job.params.seed, prompt_tokens=len(job.prompt)
        )
    )


def block_event(
    log: CommitLog, block: Block, text: str, asked: GenerationParams, *, log_probs: bool
) -> pb.GenerateResponse:
    """The message of the log's last block, with log-probabilities if they were asked for, and with
    the steps and threshold that were used if the request has floors."""
    message = pb.Block(
        index=log.num_blocks - 1,
        start=block.start,
        token_ids=block.token_ids,
        text=text,
        commit_steps=block.commit_steps,
        confidences=block.confidences,
        log_probs=block.log_probs if log_probs else (),
        usage=usage_of(log),
    )
    if asked.may_be_eased:
        served = log.served(asked)
        message.steps_per_block = served.steps_per_block
        message.confidence_threshold = served.confidence_threshold
    return pb.GenerateResponse(block=message)


def complete_event(log: CommitLog, matched_stop: str | None) -> pb.GenerateResponse:
    """The last message of a stream. Raises RuntimeError if the log has no end."""
    if log.finish_reason is None:
        raise RuntimeError("the blocks ended without a finish reason")
    complete = pb.Complete(
        finish_reason=log.finish_reason, usage=usage_of(log), matched_stop=matched_stop
    )
    return pb.GenerateResponse(complete=complete)


def usage_of(log: CommitLog) -> pb.Usage:
    """Cost of the blocks of a log."""
    return pb.Usage(**asdict(log.usage))


def score_response(token_ids: Sequence[int], log_probs: Sequence[float]) -> pb.ScoreResponse:
    """The answer of Score."""
    return pb.ScoreResponse(token_ids=token_ids, log_probs=log_probs)


def model_info(
    config: TwoTowerConfig,
    *,
    name: str,
    version: str,
    max_context: int,
    modes: Sequence[str],
    has_tokenizer: bool,
    dtype: str,
) -> pb.ModelInfo:
    """The answer of GetModelInfo."""
    return pb.ModelInfo(
        name=name,
        version=version,
        vocab_size=config.vocab_size,
        max_context=max_context,
        modes=modes,
        eos_token_id=config.eos_token_id,
        has_tokenizer=has_tokenizer,
        layer_pattern=config.layer_pattern,
        dtype=dtype,
    )
