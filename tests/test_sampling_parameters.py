"""GenerationParams has the list of sampling parameters; whatever repeats it is held to it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Collection, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from twotower import Request, TwoTower
from twotower.call_loop import CallLoop
from twotower.cli.main import app
from twotower.client import Client
from twotower.deployments.http.bodies import ChatBody, CompletionBody
from twotower.deployments.router import codec, kserve
from twotower.protos.kserve import inference_pb2 as kserve_pb
from twotower.protos.v1 import generation_pb2 as pb
from twotower.towers.request.params import FLOORS, SAMPLING_PARAMETERS, GenerationParams

# On the wire in place of the end-of-text token, which is the model's; and what shapes the answer.
WIRE_ONLY = ("ignore_eos", "logprobs")
NEITHER_IN_PROCESS = FLOORS
# What a command prints is whole blocks, and what `generate` returns is a whole output.
STREAMS_ONLY = ("provisional",)


def lacking(file: str, has: Collection[str], wanted: Collection[str]) -> list[str]:
    """A sentence for each parameter that a file lacks."""
    return [
        f"{file} lacks the sampling parameter {name!r} of towers/request/params.py"
        for name in wanted
        if name not in has
    ]


def parameters_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def options() -> Mapping[str, Any]:
    """Options of `twotower generate` with their defaults."""
    command = typer.main.get_command(app).commands["generate"]  # type: ignore[attr-defined]
    return {option.name: option.default for option in command.params}


def test_everything_that_repeats_the_list_has_all_of_it() -> None:
    sent = (*SAMPLING_PARAMETERS, *WIRE_ONLY)
    here = [name for name in SAMPLING_PARAMETERS if name not in NEITHER_IN_PROCESS]
    here.append("eos_token_id")
    whole = [name for name in here if name not in STREAMS_ONLY]
    printed = [name for name in sent if name not in STREAMS_ONLY]
    wire = [field.name for field in pb.SamplingParams.DESCRIPTOR.fields]
    missing = [
        *lacking("protos/v1/generation.proto (SamplingParams)", wire, sent),
        *lacking("twotower/client/client.py", parameters_of(Client.generate), sent),
        *lacking("twotower/cli/generate.py", options(), printed),
        *lacking("twotower/api.py (generate)", parameters_of(TwoTower.generate), whole),
        *lacking("twotower/api.py (stream)", parameters_of(TwoTower.stream), here),
        *lacking("twotower/api.py (astream)", parameters_of(TwoTower.astream), here),
    ]
    assert missing == []


def test_the_wire_has_nothing_else() -> None:
    wire = {field.name for field in pb.SamplingParams.DESCRIPTOR.fields}
    assert wire - {*SAMPLING_PARAMETERS, *WIRE_ONLY} == set()


def test_defaults_are_the_same_everywhere() -> None:
    want = GenerationParams()
    for name in SAMPLING_PARAMETERS:
        default = getattr(want, name)
        if name not in STREAMS_ONLY:
            assert (options()[name] or default) == default, name
        for function in (TwoTower.generate, TwoTower.stream, TwoTower.astream):
            if name in STREAMS_ONLY and function is TwoTower.generate:
                assert name not in parameters_of(function)
            elif name not in NEITHER_IN_PROCESS:
                assert (parameters_of(function)[name].default or default) == default, name
        # A client leaves its service the choice.
        assert parameters_of(Client.generate)[name].default in (None, ())
    unset = codec.params_of(pb.SamplingParams(seed=1), eos_token_id=None)
    assert unset == GenerationParams(seed=1)


VALUES: dict[str, Any] = {
    "mode": "verified",
    "max_tokens": 9,
    "block_size": 8,
    "steps_per_block": 7,
    "confidence_threshold": 0.875,
    "temperature": 0.75,
    "top_k": 6,
    "top_p": 0.625,
    "min_p": 0.5,
    "seed": 5,
    "draft_steps": 4,
    "min_tokens": 3,
    "stop": ["x"],
    "min_steps_per_block": 2,
    "min_confidence_threshold": 0.375,
    "presence_penalty": 1.5,
    "frequency_penalty": -0.25,
    "logit_bias": [(3, 1.25)],
    "top_logprobs": 2,
    "provisional": True,
    "quality": "near",
    "draft_source": "lookup",
    "acceptance": "mix",
    "mix_ratio": 0.75,
    "commit_rule": "product",
    "first_token": "denoiser",
}
HERE = {name: value for name, value in VALUES.items() if name not in NEITHER_IN_PROCESS}


def test_what_a_client_is_given_arrives_at_the_service() -> None:
    assert set(VALUES) == set(SAMPLING_PARAMETERS)
    with Client("127.0.0.1:1") as client:
        request = client.generate([1], **VALUES, resume=False)._request
    arrived = codec.params_of(request.sampling_params, eos_token_id=None)
    assert arrived == GenerationParams(**VALUES)


def test_what_a_body_of_http_has_arrives() -> None:
    given = VALUES | {"logit_bias": {"3": 1.25}, "logprobs": VALUES["top_logprobs"]}
    del given["top_logprobs"]
    body = CompletionBody(prompt="x", **given)
    assert body.params(VALUES["max_tokens"], VALUES["top_logprobs"], None) == GenerationParams(
        **VALUES
    )
    chat = ChatBody.model_fields
    assert lacking("deployments/http/bodies.py", chat, [*SAMPLING_PARAMETERS, "ignore_eos"]) == []


@pytest.mark.parametrize("place", ["parameters", "sampling_parameters"])
def test_what_a_request_of_kserve_has_arrives(place: str) -> None:
    request = kserve_pb.ModelInferRequest(model_name="m")
    # A parameter of a message is one value.
    lists = ("stop", "logit_bias") if place == "parameters" else ()
    no_place = (*STREAMS_ONLY, "top_logprobs", *lists)
    given = {name: value for name, value in VALUES.items() if name not in no_place}
    inputs = {"text_input": "x"}
    if place == "parameters":
        kinds = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
        for name, value in given.items():
            setattr(request.parameters[name], kinds[type(value)], value)
    else:
        inputs[place] = json.dumps(given | {"logit_bias": {"3": 1.25}})
    for name, text in inputs.items():
        contents = kserve_pb.InferTensorContents(bytes_contents=[text.encode()])
        request.inputs.add(name=name, datatype="BYTES", shape=[1], contents=contents)
    model: Any = SimpleNamespace(name="m", eos_token_id=None)
    arrived = kserve.inference_of(request, "r", model, may_stream=False).asked.params
    assert arrived == GenerationParams(**given)


def test_what_the_command_line_is_given_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []
    monkeypatch.setattr("twotower.cli.generate.generate_here", lambda *args: taken.append(args[4]))
    want = {name: value for name, value in VALUES.items() if name not in STREAMS_ONLY}
    given = want | {"stop": "x", "logit_bias": "3=1.25"}
    options = [part for name, value in given.items() for part in (_option(name), str(value))]
    assert CliRunner().invoke(app, ["generate", "x", *options]).exit_code == 0
    assert taken == [want]


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def test_what_a_model_here_is_given_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[GenerationParams] = []

    def begun(_model: TwoTower, _prompt: Any, params: GenerationParams, *_: Any) -> None:
        taken.append(params)

    def requested(_model: TwoTower, requests: list[Request]) -> None:
        taken.append(requests[0].params)

    monkeypatch.setattr(TwoTower, "_begun", begun)
    monkeypatch.setattr(TwoTower, "generate_requests", requested)
    monkeypatch.setattr("twotower.api.GenerationStream", lambda *_: None)
    monkeypatch.setattr("twotower.api.AsyncGenerationStream", lambda *_: None)
    model = TwoTower.__new__(TwoTower)
    model._calls = CallLoop()
    model.stream([1], **HERE, eos_token_id=1)
    model.astream([1], **HERE, eos_token_id=1)
    whole = {name: value for name, value in HERE.items() if name not in STREAMS_ONLY}
    model.generate([[1]], **whole, eos_token_id=1)
    assert taken == [GenerationParams(**given, eos_token_id=1) for given in (HERE, HERE, whole)]
