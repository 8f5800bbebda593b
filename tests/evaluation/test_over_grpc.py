"""`twotower eval` against a service in real processes gives what it gives in process."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.evaluation.conftest import TASKS
from twotower.cli.main import app
from twotower.client import ServiceError
from twotower.evaluation.backend import Asked
from twotower.towers.request.params import GenerationParams

with warnings.catch_warnings():
    # Ray's own models use a spelling that pydantic has deprecated; ours may not.
    warnings.simplefilter("ignore")
    from twotower.deployments.config import ServiceConfig
    from twotower.deployments.server.server import LocalService, free_port

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def service() -> Iterator[LocalService]:
    """A service on the shipped model."""
    config = ServiceConfig(
        grpc_port=free_port(), http_port=free_port(), num_threads=1, max_num_seqs=4
    )
    with LocalService(config) as running:
        yield running


def results(folder: Path, name: str, *arguments: str) -> dict[str, Any]:
    output = folder / f"{name}.json"
    common = ["--tasks", ",".join(TASKS), "--include-path", str(folder), "--output", str(output)]
    done = CliRunner().invoke(app, ["eval", *common, *arguments])
    assert done.exit_code == 0, done.output
    return dict(json.loads(output.read_text(encoding="utf-8")))


@pytest.mark.parametrize("mode", ["mask_diffusion", "verified"])
def test_a_service_gives_the_figures_of_a_model_in_process(
    lm_eval: Any, service: LocalService, task_folder: Path, mode: str
) -> None:
    assert lm_eval is not None
    params = ("block_size=8", "temperature=0", "draft_source=denoiser")
    settings = ("--mode", mode, *(part for one in params for part in ("--param", one)))
    here = results(task_folder, "here", *settings)
    there = results(task_folder, "there", "--target", service.address, *settings)
    for task in TASKS:
        for metric, value in here["results"][task].items():
            want = pytest.approx(value, abs=1e-4) if isinstance(value, float) else value
            assert there["results"][task][metric] == want
    assert there["n-samples"] == here["n-samples"]
    assert there["twotower"]["params"] == here["twotower"]["params"]
    # The service's prefix cache has read some prompts before, so passes over prompts may differ.
    for counter in ("completions", "tokens", "nfe", "scored_texts", "scored_tokens"):
        assert there["twotower"]["spent"][counter] == here["twotower"]["spent"][counter]


def test_calls_in_flight_keep_their_order_and_a_refusal_ends_them(service: LocalService) -> None:
    from twotower.evaluation.in_process import InProcess
    from twotower.evaluation.over_grpc import OverGrpc

    there, here = OverGrpc(service.address, calls=3), InProcess(rows=4)
    try:
        assert (there.max_context, there.eos_token_id) == (here.max_context, here.eos_token_id)
        prompts = [here.encode(f"def f{n}(x):\n    return") for n in range(7)]
        params = GenerationParams(max_tokens=9, seed=4, temperature=0.8, stop=("\n",))
        asked = [Asked(prompt, params) for prompt in prompts]
        assert [one.text for one in there.write(asked)] == [one.text for one in here.write(asked)]
        for got, want in zip(there.score(prompts), here.score(prompts), strict=True):
            assert got.best == want.best
            assert got.log_probs == pytest.approx(want.log_probs, abs=1e-4)
        with pytest.raises(ServiceError, match="INVALID_ARGUMENT"):
            there.score([*prompts, [1_000_000, 1]])
    finally:
        there.close()
