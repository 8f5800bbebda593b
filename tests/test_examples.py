"""The programs of examples/, each run as a user would."""

from __future__ import annotations

import re
import runpy
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from twotower import GenerationParams, Request, TwoTower
from twotower.client import Client

FOLDER = Path(__file__).parents[1] / "examples"
Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs an example with arguments; returns what it prints."""

    def run_example(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(FOLDER / name), run_name="__main__")
        return capsys.readouterr().out

    return run_example


@pytest.fixture(scope="module")
def shipped() -> TwoTower:
    return TwoTower.from_pretrained()


def test_every_example_is_run_here() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    missing = [path.name for path in FOLDER.glob("*.py") if f'run("{path.name}"' not in text]
    assert missing == []


def test_a_stream_prints_what_generate_returns(run: Run, shipped: TwoTower) -> None:
    (whole,) = shipped.generate(["class A:\n"], max_tokens=32)
    assert run("stream.py", "class A:\n") == f"class A:\n{whole.text}\n"


def test_two_streams_at_once_have_the_text_of_each_alone(run: Run, shipped: TwoTower) -> None:
    prompts = runpy.run_path(str(FOLDER / "stream_async.py"))["PROMPTS"]
    whole = [shipped.generate([prompt], max_tokens=32)[0].text for prompt in prompts]
    assert run("stream_async.py").splitlines() == [repr(text) for text in whole]


def test_a_batch_prints_a_line_per_request(run: Run) -> None:
    lines = run("batch_of_prompts.py").splitlines()
    modes = ["mask_diffusion", "mask_diffusion", "ar"]
    assert [line.split(":")[0] for line in lines] == modes
    assert [line.split()[1] for line in lines[:2]] == ["32", "16"]
    assert " 0 denoiser passes" in lines[2]


def test_a_checkpoint_of_ones_own(run: Run, tiny_a: Path) -> None:
    shape, tokens = run("own_checkpoint.py", str(tiny_a), "5", "6", "7").splitlines()
    assert shape == "MEM*EMEM*E, width 56, 512 tokens"
    (whole,) = TwoTower.from_pretrained(tiny_a).generate([[5, 6, 7]], max_tokens=16)
    assert tokens == str(whole.token_ids)


def test_a_program_of_transformers(run: Run, shipped: TwoTower) -> None:
    (whole,) = shipped.generate(["class A:\n"], max_tokens=32, commit_rule="released")
    text, loss = run("hugging_face.py", "class A:\n").rstrip("\n").rsplit("\n", 1)
    assert text == f"class A:\n{whole.text}"
    scores = shipped.score([*shipped.encode("class A:\n"), *whole.token_ids])
    assert loss == f"loss {-sum(scores) / len(scores):.2f} nats a token"


# First: it has a Ray of its own, and a process has one at a time.
@pytest.mark.cluster
@pytest.mark.filterwarnings("default")
def test_a_batch_job_answers_in_order_and_names_what_it_cannot(run: Run, shipped: TwoTower) -> None:
    prompts = runpy.run_path(str(FOLDER / "batch_job.py"))["PROMPTS"]
    *answers, summary = run("batch_job.py").splitlines()[-4:]
    params = GenerationParams(mode="verified", max_tokens=16)
    whole = shipped.generate_requests([Request(text, params) for text in prompts if text])
    expected = [f"request-{i} {result.text!r}" for i, result in enumerate(whole)]
    assert answers == expected
    assert "'completed': 3, 'errors': 1" in summary


@pytest.fixture(scope="module")
def service() -> Iterator[Any]:
    """A running service with the shipped model, for the examples that want one."""
    # Imports Ray, which only these tests need and whose models use spellings that are deprecated.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from twotower.deployments.config import ServiceConfig
        from twotower.deployments.server.server import LocalService, free_port

    config = ServiceConfig(grpc_port=free_port(), http_port=free_port(), cpus_per_tower=0.1)
    with LocalService(config) as running:
        yield running


@pytest.mark.cluster
@pytest.mark.filterwarnings("default")
def test_a_resumed_stream_has_the_text_of_one_that_was_not_left(run: Run, service: Any) -> None:
    *text, last = run("resume.py", service.address).splitlines()
    found = re.fullmatch(r"(\d+) tokens after (\d+), seed (\d+)", last)
    assert found is not None
    later, earlier, seed = map(int, found.groups())
    # A block, or less where the drawn text ends in it.
    assert 1 <= earlier <= 16
    with Client(service.address) as client:
        whole = client.generate("def read(path):\n", max_tokens=48, temperature=0.8, seed=seed)
        pieces = [block.text for block in whole]
    assert "\n".join(text) == "".join(pieces)
    assert len(whole.token_ids) == earlier + later


@pytest.mark.cluster
@pytest.mark.filterwarnings("default")
def test_a_pipeline_of_ray_data(run: Run, service: Any) -> None:
    from twotower.data.bodies import row_seed

    http = f"127.0.0.1:{service.config.http_port}"
    lines = run("ray_data_pipeline.py", http).splitlines()
    fault, *rows = [line for line in lines if re.match(r"('|read_)", line)]
    assert (
        fault == "'': prompt: got None, expected a text, token ids or messages (mappings with "
        "role and content)"
    )
    assert [row.split(":")[0] for row in rows] == ["read_csv", "read_json", "read_path", "read_url"]
    with Client(service.address) as client:
        for row in rows:
            name = row.split(":")[0]
            how = {"max_tokens": 24, "temperature": 0.8, "seed": row_seed(0, name)}
            stream = client.generate(f"def {name}(source):\n", **how)
            text = "".join(block.text for block in stream)
            assert row.endswith(f": {text!r}")
            assert f": {len(stream.token_ids)} tokens, " in row
