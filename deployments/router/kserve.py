"""Converts between KServe's messages and requests: what the model's tensors and parameters mean.

A request has a prompt, `text_input` or `input_ids`, and says how to complete it in `parameters` or
in `sampling_parameters`, a JSON object; of two values for a name the former counts. With `stream`
each block is an answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from twotower.deployments.completions.requests import (
    CompletionRequest,
    Input,
    NotServedError,
    request_id_of,
)
from twotower.deployments.router.tensors import named_values, with_outputs
from twotower.protos.kserve import inference_pb2 as pb
from twotower.towers.errors import InvalidRequestError
from twotower.towers.request.params import SAMPLING_PARAMETERS, GenerationParams

if TYPE_CHECKING:
    from twotower.deployments.completions.completions import Completion, ServedModel

PLATFORM = "twotower"
# Of the model: there is one, which a service does not exchange.
MODEL_VERSION = "1"
EXTENSIONS = ("model_streaming",)
TEXT, IDS, SAMPLING, STREAM = "text_input", "input_ids", "sampling_parameters", "stream"
INPUTS: dict[str, tuple[str, ...]] = {
    TEXT: ("BYTES",),
    IDS: ("INT32", "INT64"),
    SAMPLING: ("BYTES",),
    STREAM: ("BOOL",),
}
# Type and sizes of each output.
OUTPUTS: dict[str, tuple[str, int]] = {
    "text_output": ("BYTES", 1),
    "output_ids": ("INT32", -1),
    "finish_reason": ("BYTES", 1),
}
FINAL = "triton_final_response"
# Clients say so who want to be told the last answer, as all are.
_TOLD = "triton_enable_empty_final_response"
_NO_PLACE = ("provisional", "top_logprobs")
_PARAMETERS = tuple(name for name in (*SAMPLING_PARAMETERS, "ignore_eos") if name not in _NO_PLACE)


@dataclass(frozen=True)
class Inference:
    """A request, the outputs that its answers have, and whether each block is an answer."""

    asked: CompletionRequest
    outputs: tuple[str, ...]
    streams: bool


def inference_of(
    message: pb.ModelInferRequest, request_id: str, model: ServedModel, *, may_stream: bool
) -> Inference:
    """The request of a message; `request_id` is its name if it brings none.

    Raises InvalidRequestError, and NotServedError for another model.
    """
    name = request_id_of(message.id or request_id, "id")
    check_model(model, message.model_name, message.model_version)
    values = named_values(message, INPUTS)
    streams = bool(_single(values, STREAM, default=False))
    if streams and not may_stream:
        raise InvalidRequestError(STREAM, streams, "False: ModelStreamInfer streams")
    given = _json_parameters(values) | _message_parameters(message)
    params = _params(given, model.eos_token_id)
    asked = CompletionRequest(name, _prompt(values), params)
    return Inference(asked, _requested(message), streams)


def check_model(model: ServedModel, name: str, version: str) -> None:
    """Raises NotServedError for a model or version that is not served."""
    if name != model.name:
        raise NotServedError("model_name", name, repr(model.name))
    if version not in ("", MODEL_VERSION):
        raise NotServedError("model_version", version, repr(MODEL_VERSION))


def answer_of(
    completion: Completion,
    inference: Inference,
    model: ServedModel,
    text: str,
    token_ids: Sequence[int],
) -> pb.ModelInferResponse:
    """The answer that has this text and these ids of a completion's output."""
    reason = completion.log.finish_reason
    response = pb.ModelInferResponse(
        model_name=model.name, model_version=MODEL_VERSION, id=inference.asked.request_id
    )
    for name, count in asdict(completion.log.usage).items():
        response.parameters[name].int64_param = count
    response.parameters["seed"].int64_param = completion.seed
    response.parameters[FINAL].bool_param = reason is not None
    values = {"text_output": [text], "output_ids": token_ids, "finish_reason": [reason or ""]}
    with_outputs(response, [(name, OUTPUTS[name][0], values[name]) for name in inference.outputs])
    return response


def failure(message: str, request_id: str) -> pb.ModelStreamInferResponse:
    """What a stream says of a request that has failed."""
    response = pb.ModelInferResponse(id=request_id)
    response.parameters[FINAL].bool_param = True
    return pb.ModelStreamInferResponse(error_message=message, infer_response=response)


def server_metadata(model: ServedModel) -> pb.ServerMetadataResponse:
    """The answer of ServerMetadata."""
    return pb.ServerMetadataResponse(name=PLATFORM, version=model.version, extensions=EXTENSIONS)


def model_metadata(model: ServedModel) -> pb.ModelMetadataResponse:
    """The answer of ModelMetadata."""
    response = pb.ModelMetadataResponse(
        name=model.name, versions=[MODEL_VERSION], platform=PLATFORM
    )
    for name, datatypes in INPUTS.items():
        if name != TEXT or model.has_tokenizer:
            shape = [-1 if name == IDS else 1]
            response.inputs.add(name=name, datatype=datatypes[0], shape=shape)
    for name, (datatype, size) in OUTPUTS.items():
        response.outputs.add(name=name, datatype=datatype, shape=[size])
    return response


def _single(values: Mapping[str, list[Any]], name: str, default: Any = None) -> Any:
    """The only element of an input."""
    if name not in values:
        return default
    if len(values[name]) != 1:
        raise InvalidRequestError(name, f"{len(values[name])} elements", "1")
    return values[name][0]


def _text(values: Mapping[str, list[Any]], name: str) -> str:
    raw: bytes = _single(values, name)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        found = f"byte 0x{raw[error.start]:02x} at {error.start}"
        raise InvalidRequestError(name, found, "UTF-8") from None


def _prompt(values: Mapping[str, list[Any]]) -> Input:
    if (TEXT in values) == (IDS in values):
        found = "both" if TEXT in values else "neither"
        raise InvalidRequestError(f"{TEXT}, {IDS}", found, "one of them")
    return _text(values, TEXT) if TEXT in values else values[IDS]


def _requested(message: pb.ModelInferRequest) -> tuple[str, ...]:
    names = dict.fromkeys(output.name for output in message.outputs)
    for name in names:
        if name not in OUTPUTS:
            raise InvalidRequestError("outputs", name, f"one of {', '.join(OUTPUTS)}")
    return tuple(names or OUTPUTS)


def _json_parameters(values: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Parameters of the JSON object; null leaves the default."""
    if SAMPLING not in values:
        return {}
    text = _text(values, SAMPLING)
    try:
        given = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise InvalidRequestError(SAMPLING, text, "a JSON object") from None
    if not isinstance(given, dict):
        raise InvalidRequestError(SAMPLING, text, "a JSON object")
    bias = given.get("logit_bias")
    if isinstance(bias, dict):
        given["logit_bias"] = {_token_id(key): value for key, value in bias.items()}
    return {name: value for name, value in given.items() if value is not None}


def _message_parameters(message: pb.ModelInferRequest) -> dict[str, Any]:
    given = {}
    for name, parameter in message.parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        if kind is None:
            raise InvalidRequestError(name, "nothing", "a value")
        if name != _TOLD:
            given[name] = getattr(parameter, kind)
    return given


def _params(given: dict[str, Any], eos_token_id: int | None) -> GenerationParams:
    for name in given:
        if name not in _PARAMETERS:
            raise InvalidRequestError("parameters", name, f"one of {', '.join(_PARAMETERS)}")
    ignored = given.pop("ignore_eos", False)
    if not isinstance(ignored, bool):
        raise InvalidRequestError("ignore_eos", ignored, "true or false")
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    return GenerationParams(**given, eos_token_id=None if ignored else eos_token_id).with_seed()


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdecimal() and len(key) < 12):
        raise InvalidRequestError("logit_bias", key, "token ids as keys")
    return int(key)


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
