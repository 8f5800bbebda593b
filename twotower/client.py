"""A client of the service over gRPC; needs neither torch nor ray."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import grpc

from twotower.protos.v1 import generation_pb2 as pb
from twotower.protos.v1 import generation_pb2_grpc
from twotower.towers.errors import InvalidRequestError, TwoTowerError

Prompt = str | Sequence[int]


class ServiceError(TwoTowerError):
    """The service refused or failed a call; `code` is its gRPC status."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        self.code = code
        super().__init__(f"{code.name}: {details}")


@dataclass(frozen=True)
class TextBlock:
    """One committed block; per token its denoising step and probability.

    `log_probs` are their natural logs, empty unless they were asked for.
    """

    index: int
    start: int
    token_ids: tuple[int, ...]
    text: str
    commit_steps: tuple[int, ...]
    confidences: tuple[float, ...]
    log_probs: tuple[float, ...]


@dataclass(frozen=True)
class Usage:
    """What a completion cost: tokens, denoiser passes (`nfe`) and context tower passes.

    `cached_tokens` of the prompt came from the prefix cache; in verified, `accepted_tokens` of
    `drafted_tokens` were accepted.
    """

    prompt_tokens: int
    completion_tokens: int
    nfe: int
    context_passes: int
    cached_tokens: int
    accepted_tokens: int
    drafted_tokens: int


@dataclass(frozen=True)
class Score:
    """The scored tokens, and natural-log probabilities of all but the first."""

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]


@dataclass(frozen=True)
class ModelInfo:
    """What a service serves, and its limits."""

    name: str
    version: str
    vocab_size: int
    max_context: int
    modes: tuple[str, ...]
    eos_token_id: int | None
    has_tokenizer: bool
    layer_pattern: str
    dtype: str


class GenerationStream:
    """Iterates over the blocks of one completion.

    `request_id`, `seed` and `prompt_tokens` are there once the service has admitted the request
    (with the first block at the latest), `finish_reason`, `matched_stop` (the stop string that
    ended the output, or None) and `usage` after the last block. `token_ids` are those received so
    far: with the seed, what a resume needs. `log_probs` are theirs, if they were asked for.
    """

    def __init__(self, call: Any) -> None:
        self._call = call
        self.request_id: str | None = None
        self.seed: int | None = None
        self.prompt_tokens: int | None = None
        self.token_ids: list[int] = []
        self.log_probs: list[float] = []
        self.finish_reason: str | None = None
        self.matched_stop: str | None = None
        self.usage: Usage | None = None

    def __iter__(self) -> Iterator[TextBlock]:
        """Raises ServiceError."""
        try:
            for response in self._call:
                block = self._take(response)
                if block is not None:
                    yield block
        except grpc.RpcError as error:
            raise _service_error(error) from None
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Ends the request; the service frees its row. Does nothing after the end."""
        self._call.cancel()

    def _take(self, response: pb.GenerateResponse) -> TextBlock | None:
        kind = response.WhichOneof("event")
        if kind == "started":
            self.request_id = response.started.request_id
            self.seed = response.started.seed
            self.prompt_tokens = response.started.prompt_tokens
        if kind == "block":
            self.token_ids.extend(response.block.token_ids)
            self.log_probs.extend(response.block.log_probs)
            return _text_block(response.block)
        if kind == "complete":
            complete = response.complete
            self.finish_reason = complete.finish_reason
            if complete.HasField("matched_stop"):
                self.matched_stop = complete.matched_stop
            self.usage = _usage(complete.usage)
        return None


class Client:
    """Calls one service; `target` is `host:port`. Use it as a context manager or `close` it."""

    def __init__(self, target: str) -> None:
        self._channel = grpc.insecure_channel(target)
        self._stub = generation_pb2_grpc.GenerationStub(self._channel)

    def generate(
        self,
        prompt: Prompt,
        *,
        mode: str | None = None,
        max_tokens: int | None = None,
        block_size: int | None = None,
        steps_per_block: int | None = None,
        confidence_threshold: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | None = None,
        ignore_eos: bool | None = None,
        draft_steps: int | None = None,
        min_tokens: int | None = None,
        stop: Sequence[str] = (),
        logprobs: bool | None = None,
        generated_token_ids: Sequence[int] = (),
        request_id: str = "",
        timeout: float | None = None,
    ) -> GenerationStream:
        """Starts a completion of a text or of token ids; None leaves the service's default.

        `stop` is a list of strings, `logprobs` asks for log-probabilities, `generated_token_ids`
        resumes a broken stream; `timeout` is in seconds, for the whole. Raises
        InvalidRequestError if `stop` is not a list.
        """
        sampling = pb.SamplingParams(
            mode=mode,
            max_tokens=max_tokens,
            block_size=block_size,
            steps_per_block=steps_per_block,
            confidence_threshold=confidence_threshold,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            ignore_eos=ignore_eos,
            draft_steps=draft_steps,
            min_tokens=min_tokens,
            stop=_texts(stop),
            logprobs=logprobs,
        )
        request = pb.GenerateRequest(
            request_id=request_id,
            **_input_of(prompt),
            sampling_params=sampling,
            generated_token_ids=generated_token_ids,
        )
        return GenerationStream(self._stub.Generate(request, timeout=timeout))

    def score(self, text: Prompt, *, timeout: float | None = None) -> Score:
        """Log-probabilities of a text or of token ids. Raises ServiceError."""
        request = pb.ScoreRequest(**_input_of(text))
        try:
            response = self._stub.Score(request, timeout=timeout)
        except grpc.RpcError as error:
            raise _service_error(error) from None
        return Score(tuple(response.token_ids), tuple(response.log_probs))

    def model_info(self, *, timeout: float | None = None) -> ModelInfo:
        """What is served. Raises ServiceError."""
        try:
            info = self._stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=timeout)
        except grpc.RpcError as error:
            raise _service_error(error) from None
        return ModelInfo(
            name=info.name,
            version=info.version,
            vocab_size=info.vocab_size,
            max_context=info.max_context,
            modes=tuple(info.modes),
            eos_token_id=info.eos_token_id if info.HasField("eos_token_id") else None,
            has_tokenizer=info.has_tokenizer,
            layer_pattern=info.layer_pattern,
            dtype=info.dtype,
        )

    def close(self) -> None:
        """Ends all calls and the connection."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _input_of(prompt: Prompt) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"text": prompt}
    return {"tokens": pb.TokenIds(ids=prompt)}


def _texts(stop: Sequence[str]) -> Sequence[str]:
    if isinstance(stop, str):
        # It is a sequence of strings too: each of its letters would end the output.
        raise InvalidRequestError("stop", stop, "a list of strings")
    return stop


def _usage(usage: pb.Usage) -> Usage:
    return Usage(
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.nfe,
        usage.context_passes,
        usage.cached_tokens,
        usage.accepted_tokens,
        usage.drafted_tokens,
    )


def _text_block(block: pb.Block) -> TextBlock:
    return TextBlock(
        block.index,
        block.start,
        tuple(block.token_ids),
        block.text,
        tuple(block.commit_steps),
        tuple(block.confidences),
        tuple(block.log_probs),
    )


def _service_error(error: Any) -> ServiceError:
    return ServiceError(error.code(), error.details() or "no details")
