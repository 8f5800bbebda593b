"""The command line: help without torch, text on stdout, figures and errors on stderr."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.client.test_client_resume import Mortal, Server
from tests.support.terminal import run_in_terminal
from twotower import TwoTower
from twotower.agreement import Comparison
from twotower.cli import commands
from twotower.cli.main import app
from twotower.towers.request.results import TextBlock, Usage

GOLDEN = Path(__file__).parents[1] / "golden"
INT_KEY = Path(__file__).parents[1] / "data" / "faults" / "int_key.yaml"


def test_the_mode_of_the_towers_is_an_option_of_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[object] = []

    def serve(_: object, settings: dict[str, object], *__: object) -> None:
        given.append(settings["deterministic"])

    monkeypatch.setattr(commands, "serve", serve)
    for options in ([], ["--deterministic"]):
        assert CliRunner().invoke(app, ["serve", *options]).exit_code == 0
    assert given == [None, True]


def test_help_needs_no_heavy_import() -> None:
    program = (
        "import sys, twotower.cli.main\n"
        "from typer.testing import CliRunner\n"
        "result = CliRunner().invoke(twotower.cli.main.app, ['--help'])\n"
        "assert result.exit_code == 0, result.output\n"
        "heavy = {'torch', 'ray', 'transformers', 'grpc'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "print(result.output)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    for word in (
        "serve",
        "generate",
        "verify",
        "quantize",
        "bench",
        "plan",
        "train",
        "top",
        "sweep",
    ):
        assert word in done.stdout


@pytest.mark.parametrize(
    "command", ["serve", "generate", "verify", "quantize", "plan", "train", "top", "sweep"]
)
def test_each_command_explains_itself(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert len(result.output.splitlines()) > 5


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["generate", "x", "--max-tokens", "0"], "max_tokens: got 0"),
        (["generate", "x", "--mode", "beam"], "mode: got 'beam'"),
        (["generate", "x", "--draft-steps", "0"], "draft_steps: got 0"),
        (["generate", "x", "--min-tokens", "65"], "min_tokens: got 65"),
        (["generate", "x", "--stop", "a", "--stop", ""], "stop[1]: got ''"),
        (["generate", "x", "--logit-bias", "3"], "logit_bias: got '3', expected ID=BIAS"),
        (["generate", "x", "--logit-bias", "3=x"], "logit_bias: got '3=x', expected ID=BIAS"),
        (["generate", "x", "--logit-bias", "3=1e9"], "logit_bias[3]: got 1000000000.0"),
        (["generate", "x", "--top-logprobs", "21"], "top_logprobs: got 21"),
        (
            ["generate", "x", "--model", "no-such-folder", "--dtype", "float16"],
            "dtype: got 'float16', expected one of float32, bfloat16",
        ),
        (
            ["generate", "x", "--model", "no-such-folder", "--expert-products", "int8"],
            "expert_products: got 'int8', expected one of widened, fp8",
        ),
        (["generate", "x", "--expert-products", "fp8"], "expert_products: got 'fp8', expected"),
        (["serve", "--expert-products", "int8"], "expert_products: Input should be 'widened' or"),
        (["verify", str(GOLDEN / "tiny_a"), "--dtype", "float16"], "dtype: got 'float16'"),
        (["train", "out", "--dtype", "float16"], "dtype: got 'float16', expected one of"),
        (["serve", "--dtype", "float16"], "dtype: Input should be 'float32' or 'bfloat16'"),
        (["generate", "x", "--model", str(GOLDEN / "tiny_a")], "a model that has a tokenizer"),
        (["generate", "x", "--model", "no-such-folder"], "no-such-folder"),
        (["generate", "x", "--target", "127.0.0.1:1"], "UNAVAILABLE"),
        (["generate", "x", "--max-tokens", str(2**70)], f"max_tokens: got '1 prompt + {2**70} new"),
        (["serve", "--max-num-seqs", "0"], "max_num_seqs"),
        (["serve", "--config", str(INT_KEY)], "1: got a key of type int, expected a name"),
        (["verify", str(GOLDEN)], "error: "),
        (["quantize", "no-such-folder", "out"], "no-such-folder"),
        (["quantize", str(GOLDEN / "tiny_a"), str(GOLDEN)], "golden: exists already"),
        (["quantize", str(GOLDEN / "tiny_a"), "out", "--evaluate"], "has no tokenizer"),
        (["quantize", str(GOLDEN / "tiny_a"), "out", "--dtype", "int8"], "dtype: got 'int8'"),
    ],
)
# Ray itself warns when it is imported for the first time, which another test may have done before.
@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")
def test_errors_are_one_line(arguments: list[str], named: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert named in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert "Traceback" not in result.output


class Recorded:
    """A model in this process that keeps what the command asked it for, and its stream."""

    def __init__(self) -> None:
        self.asked: dict[str, object] = {}
        self.config = SimpleNamespace(eos_token_id=2)
        self.tokenizer = "some"
        self.usage = Usage(1, 2, 1, 1, 0, 0, 0)
        self.seed = 1
        self.token_ids: list[int] = []
        self.log_probs: list[float] = []
        self.top_log_probs: list[tuple[tuple[int, float], ...]] = []
        self.closed = 0

    def from_pretrained(self, *_: object, **__: object) -> Recorded:
        return self

    def stream(self, prompt: str, **parameters: object) -> Recorded:
        self.asked = {"prompt": prompt, **parameters}
        return self

    def __iter__(self) -> Iterator[TextBlock]:
        self.token_ids, self.log_probs = [7, 8], [-0.75, -1.5]
        yield TextBlock(0, 1, (7, 8), "text", (0, 0), (0.5, 0.25), (-0.75, -1.5))

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    model = Recorded()
    monkeypatch.setattr("twotower.api.TwoTower", model)
    return model


def test_generate_passes_its_options_on(recorded: Recorded) -> None:
    plain = CliRunner().invoke(app, ["generate", "x"])
    assert (plain.exit_code, plain.stdout) == (0, "text")
    assert "-0.75" not in plain.stderr
    # Everything that a model in this process takes is given, at its default.
    signature = inspect.signature(TwoTower.stream).parameters
    parameters = {name: one.default for name, one in signature.items() if name != "self"}
    del parameters["generated_token_ids"]
    assert recorded.asked == {
        **parameters,
        "prompt": "x",
        "stop": [],
        "logit_bias": [],
        "eos_token_id": 2,
    }
    options = ["--mode", "verified", "--draft-steps", "3", "--min-tokens", "5", "--ignore-eos"]
    CliRunner().invoke(app, ["generate", "x", *options, "--stop", "a b", "--stop", "\n\n"])
    changed = {"mode": "verified", "draft_steps": 3, "min_tokens": 5, "eos_token_id": None}
    assert recorded.asked == {
        **parameters,
        **changed,
        "prompt": "x",
        "stop": ["a b", "\n\n"],
        "logit_bias": [],
    }
    assert recorded.closed == 2


@dataclass(frozen=True)
class Draft:
    """A provisional block."""

    start: int
    step: int
    token_ids: tuple[int, ...]
    masked: tuple[bool, ...]
    confidences: tuple[float, ...]


class Drafting(Recorded):
    """One whose stream has provisional blocks, where they are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer: Any = SimpleNamespace(decode=lambda ids: "".join(map(chr, ids)))

    def stream(self, prompt: str, provisional: bool = False, **parameters: object) -> Recorded:
        self.provisional = provisional
        return super().stream(prompt, **parameters)

    def __iter__(self) -> Iterator[Any]:
        if self.provisional:
            yield Draft(0, 0, (81, 0), (False, True), (0.9, 0.0))
            # Drawn by a thread, ten times a second.
            time.sleep(0.3)
        yield from super().__iter__()


def test_provisional_blocks_are_asked_for_where_they_are_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Drafting()
    monkeypatch.setattr("twotower.api.TwoTower", model)
    piped = CliRunner().invoke(app, ["generate", "x"])
    assert (piped.stdout, model.provisional) == ("text", False)
    monkeypatch.setattr("twotower.cli.generate.is_live", lambda _: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    plain = CliRunner().invoke(app, ["generate", "x", "--plain"])
    assert (plain.stdout, model.provisional) == ("text", False)
    shown = CliRunner().invoke(app, ["generate", "x"])
    assert model.provisional
    assert shown.exit_code == 0, shown.output
    # The sure position in its text and shade, the masked one dim.
    assert "\x1b[1;36mQ\x1b[0m\x1b[2m░\x1b[0m" in shown.stdout
    assert shown.stdout.endswith("text")
    assert shown.stderr.startswith("\n2 tokens, 1 NFE, ")


def test_what_was_drafted_is_told_with_the_passes_of_both_towers(recorded: Recorded) -> None:
    recorded.usage = Usage(1, 64, 3, 13, 0, 41, 60, 38, 52)
    result = CliRunner().invoke(app, ["generate", "x", "--mode", "auto"])
    assert result.stderr.startswith(
        "\n64 tokens, 3 NFE, 13 context passes, 4.00 tokens/pass, accepted 41 of 60 drafted "
        "(lookup 38 of 52), "
    )


def test_a_service_is_shown_on_a_terminal_too() -> None:
    server = Server(Mortal(b"some text\nof a service"))
    command = ["twotower.cli", "generate", "x", "--target", f"127.0.0.1:{server.port}"]
    try:
        ended = run_in_terminal(command)
    finally:
        server.close()
    assert ended.code == 0
    first, second, cost = ended.screen.all_lines()[:3]
    assert (first, second) == ("some text", "of a service")
    assert "tokens/s" in cost
    assert "░" in ended.sent.decode()


def test_log_probabilities_are_printed_beside_the_text(recorded: Recorded) -> None:
    result = CliRunner().invoke(app, ["generate", "x", "--logprobs"])
    assert (result.exit_code, result.stdout) == (0, "text")
    assert result.stderr.endswith("7\t-0.750000\n8\t-1.500000\n")
    assert recorded.token_ids == [7, 8]


def test_the_most_probable_tokens_are_printed_too(recorded: Recorded) -> None:
    recorded.top_log_probs = [((7, -0.75), (9, -2.0)), ((8, -1.5),)]
    result = CliRunner().invoke(app, ["generate", "x", "--top-logprobs", "2"])
    assert recorded.asked["top_logprobs"] == 2
    assert result.stderr.endswith("\n7=-0.750000\t9=-2.000000\n8=-1.500000\n")


def test_what_a_service_has_used_is_said_where_a_floor_allows_less() -> None:
    service = Mortal(b"some text")
    server = Server(service)
    command = ["generate", "x", "--target", f"127.0.0.1:{server.port}"]
    try:
        plain = CliRunner().invoke(app, command)
        service.served = [(5, 0.625)] * 9
        eased = CliRunner().invoke(app, [*command, "--min-steps-per-block", "2"])
    finally:
        server.close()
    assert plain.stdout == eased.stdout == "some text"
    assert "served with" not in plain.stderr
    assert eased.stderr.endswith("served with 5 steps, threshold 0.625\n")


def test_verify_reports_every_case() -> None:
    result = CliRunner().invoke(app, ["verify", str(GOLDEN / "tiny_a"), "--dtype", "float32"])
    assert result.exit_code == 0, result.output
    assert len(result.output.splitlines()) > 2


def test_quantize_writes_a_checkpoint_and_a_report(tmp_path: Path) -> None:
    target = tmp_path / "out"
    result = CliRunner().invoke(app, ["quantize", str(GOLDEN / "tiny_a"), str(target)])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [one["layer"] for one in report["layers"]] == [1, 4, 6, 9] * 2
    assert report["bytes_after"] < report["bytes_before"]
    assert len(result.stderr.splitlines()) == 1 + 8 + 1
    assert (target / "model.safetensors").stat().st_size > report["bytes_after"]


def test_quantize_compares_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def compare(before: Path, after: Path, device: str, dtype: str) -> Comparison:
        asked.append((before, after, device, dtype))
        return Comparison((), 1.0, 1.5)

    monkeypatch.setattr("twotower.agreement.compare", compare)
    monkeypatch.setattr("twotower.towers.text.tokenizer.load_tokenizer", lambda _: "some")
    source, target = GOLDEN / "tiny_a", tmp_path / "out"
    options = ["--evaluate", "--dtype", "bfloat16"]
    result = CliRunner().invoke(app, ["quantize", str(source), str(target), *options])
    assert result.exit_code == 0, result.output
    assert asked == [(source, target, "cpu", "bfloat16")]
    assert json.loads(result.stdout)["evaluation"] == {
        "modes": [],
        "loss_before": 1.0,
        "loss_after": 1.5,
    }
