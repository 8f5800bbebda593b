"""Clients that exist today, each from its own package, against a running service."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import CLIENTS, PROGRAMS, ROOT, Programs, Service
from twotower import TwoTower

pytestmark = pytest.mark.clients
PROMPT = "def f(x):"


@pytest.fixture(scope="module")
def model() -> TwoTower:
    return TwoTower.from_pretrained()


@pytest.fixture(scope="module")
def text(model: TwoTower) -> str:
    """What every client has to get for PROMPT, 24 tokens and seed 5."""
    return written(model)


def written(model: TwoTower, **params: Any) -> str:
    eos = model.config.eos_token_id
    [result] = model.generate([PROMPT], max_tokens=24, seed=5, eos_token_id=eos, **params)
    return result.text


def test_openai(programs: Programs, model: TwoTower, text: str) -> None:
    found = programs.run("openai_sync")
    assert found["model"] == found["retrieved"] == "pystdlib"
    assert found["text"] == found["streamed"] == text
    assert found["finish_reason"] == "length"
    assert found["usage"]["completion_tokens"] == found["stream_usage"]["completion_tokens"] == 24
    assert found["usage"]["twotower"]["nfe"] > 0
    assert found["ar"] == found["verified"] == written(model, mode="ar")
    assert found["accepted"] > 0
    assert len(found["many"]) == 4
    assert found["many"][0] != found["many"][1]
    scores = model.score(model.encode(PROMPT))
    assert found["token_logprobs"][1:-1] == pytest.approx(scores, abs=1e-4)
    assert "".join(found["tokens"]).startswith(PROMPT)
    kinds = [error[:3] for error in found["errors"]]
    assert kinds == [
        ["BadRequestError", 400, "temperature"],
        ["BadRequestError", 400, "mode"],
        ["NotFoundError", 404, "model"],
        ["BadRequestError", 400, "best_of"],
        ["BadRequestError", 400, "messages"],
    ]


def test_openai_async(programs: Programs, text: str) -> None:
    assert programs.run("openai_async")["texts"] == [text] * 4


def test_litellm(programs: Programs, text: str) -> None:
    assert programs.run("litellm_call") == {"text": text, "tokens": 24}


def test_langchain(programs: Programs, text: str) -> None:
    assert programs.run("langchain_call") == {"text": text, "streamed": text}


def test_tritonclient(programs: Programs, text: str) -> None:
    found = programs.run("triton_call")
    assert (found["live"], found["ready"], found["model_ready"]) == (True, True, True)
    assert {"text_input", "input_ids"} <= set(found["inputs"])
    assert found["text"] == found["streamed"] == text
    status, message = found["error"]
    assert "NOT_FOUND" in status
    assert "other" in message


def test_openai_of_npm(programs: Programs, text: str, tmp_path: Path) -> None:
    node, package = shutil.which("node"), CLIENTS / "node_modules"
    if node is None:
        pytest.skip("node is not installed")
    if not package.exists():
        pytest.fail(f"{package} is missing: run `make clients`")
    (tmp_path / "node_modules").symlink_to(package)
    program = shutil.copy(PROGRAMS / "openai_node.mjs", tmp_path)
    found = json.loads(programs.output([node, str(program)]))
    assert found == {"text": text, "streamed": text, "status": [400, "temperature"]}


def test_curl(programs: Programs, service: Service, text: str) -> None:
    body = {"prompt": PROMPT, "max_tokens": 24, "seed": 5}
    command = ["curl", "-sS", "--max-time", "60", f"{service.base_url}/completions"]
    command += ["-H", "content-type: application/json", "-d"]
    answer = json.loads(programs.output([*command, json.dumps(body)]))
    assert answer["choices"][0]["text"] == text
    stream = programs.output([*command, json.dumps({**body, "stream": True})])
    events = [line.removeprefix("data: ") for line in stream.splitlines() if line]
    assert events.pop() == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == text


def test_grpcurl_by_reflection(programs: Programs, service: Service, text: str) -> None:
    grpcurl = str(CLIENTS / "bin" / "grpcurl")
    listed = programs.output([grpcurl, "-plaintext", service.target, "list"]).split()
    assert {"twotower.v1.Generation", "grpc.health.v1.Health"} <= set(listed)
    asked = {"text": PROMPT, "sampling_params": {"max_tokens": 24, "seed": 5}}
    method = "twotower.v1.Generation/Generate"
    command = [grpcurl, "-plaintext", "-d", json.dumps(asked), service.target, method]
    messages = _objects(programs.output(command))
    blocks = [message["block"] for message in messages if "block" in message]
    assert "".join(block.get("text", "") for block in blocks) == text


def test_code_generated_from_the_published_proto_alone(
    service: Service, text: str, tmp_path: Path
) -> None:
    """Without this package: the .proto is copied to where nothing else is."""
    shutil.copy(ROOT / "protos" / "v1" / "generation.proto", tmp_path)
    flags = ["-I.", "--python_out=.", "--grpc_python_out=.", "generation.proto"]
    generate = [sys.executable, "-m", "grpc_tools.protoc", *flags]
    subprocess.run(generate, cwd=tmp_path, check=True, timeout=60)
    program = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import grpc, generation_pb2 as pb, generation_pb2_grpc
channel = grpc.insecure_channel({service.target!r}, options=[("grpc.enable_http_proxy", 0)])
stub = generation_pb2_grpc.GenerationStub(channel)
params = pb.SamplingParams(max_tokens=24, seed=5)
request = pb.GenerateRequest(text={PROMPT!r}, sampling_params=params)
print("".join(event.block.text for event in stub.Generate(request, timeout=60)), end="")
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == text


GENERATE = """
task: tt_lines
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{want}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 16}
metric_list: [{metric: exact_match}]
"""
SCORE = """
task: tt_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: ["{{want}}", "zebra zebra zebra"]
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc}]
"""


def test_lm_eval(programs: Programs, service: Service, model: TwoTower, tmp_path: Path) -> None:
    """Its local-completions model, with the tokenizer that the service says it has."""
    prompts = ["def __init__(self", "    for name in", "import os\nimport"]
    data = tmp_path / "data.json"
    eos = model.config.eos_token_id
    results = model.generate(prompts, max_tokens=16, stop=["\n"], eos_token_id=eos)
    rows = [
        {"prompt": prompt, "want": result.text}
        for prompt, result in zip(prompts, results, strict=True)
    ]
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for name, task in (("lines", GENERATE), ("choice", SCORE)):
        (tmp_path / f"{name}.yaml").write_text(task.replace("DATA", str(data)), encoding="utf-8")
    model_args = f"model=pystdlib,base_url={service.base_url}/completions,num_concurrent=2"
    command = [str(CLIENTS / "bin" / "lm_eval"), "run", "--model", "local-completions"]
    command += ["--model_args", model_args, "--tasks", "tt_lines,tt_choice"]
    command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    programs.output(command)
    [report] = (tmp_path / "out").rglob("results_*.json")
    scores = json.loads(report.read_text(encoding="utf-8"))["results"]
    assert scores["tt_lines"]["exact_match,none"] == 1.0
    choices = [_sums(model, row["prompt"], row["want"]) for row in rows]
    assert scores["tt_choice"]["acc,none"] == pytest.approx(sum(choices) / len(choices))


def _sums(model: TwoTower, prompt: str, want: str) -> bool:
    """Whether the wanted continuation is likelier than the other."""
    context = model.encode(prompt)

    def score(text: str) -> float:
        whole = model.encode(prompt + text)
        return math.fsum(model.score(whole)[len(context) - 1 :])

    return score(want) > score("zebra zebra zebra")


def _objects(text: str) -> list[dict[str, Any]]:
    """The JSON objects that follow each other in a text."""
    decoder, found, start = json.JSONDecoder(), [], 0
    while text[start:].strip():
        start += len(text[start:]) - len(text[start:].lstrip())
        value, start = decoder.raw_decode(text, start)
        found.append(value)
    return found
