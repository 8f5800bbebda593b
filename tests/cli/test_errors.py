"""Whatever the command line is given, it ends with one line that names what was wrong."""

from __future__ import annotations

import errno
import io
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer
from typer.testing import CliRunner, Result

from twotower.bench.command import _parser
from twotower.cli import errors as cli_errors
from twotower.cli.generate import standard_input, write
from twotower.cli.main import app

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "tests" / "golden" / "tiny_a")
LARGE, HUGE, LONG = str(10**11), str(10**25), "9" * 5000
NO_NUMBERS = ["x", "", "é", LONG, "1,5"]
# Ray itself warns when it is imported for the first time, which another test may have done before.
pytestmark = pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with files that are no good; nothing is started and nothing fetched from it."""
    monkeypatch.chdir(tmp_path)
    # Tests that come later have one.
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(
        "twotower.deployments.server.server.LocalService._start_ray",
        lambda _: pytest.fail("the service was started"),
    )
    Path("file").write_text("x")
    Path("in.jsonl").write_text('{"prompt": "x"}\n')
    Path("bytes.yaml").write_bytes(b"\xff\xfe\x00a")
    Path("broken.yaml").write_text("a: [1")
    Path("list.yaml").write_text("- 1")
    Path("digits.yaml").write_text(f"max_num_seqs: {LONG}")
    Path("hex.yaml").write_text(f"max_num_seqs: 0x{'f' * 5000}")
    Path("deep.yaml").write_text("[" * 5000)
    Path("unknown.yaml").write_text("max_rows: 2")
    Path("nan.yaml").write_text("stall_timeout_s: .nan")
    Path("inf.yaml").write_text("health_check_period_s: .inf")
    Path("nul.yaml").write_text('model: "a\\0b"')
    Path("empty_folder").mkdir()
    return tmp_path


def invoke(arguments: list[str], **how: Any) -> Result:
    return CliRunner().invoke(app, arguments, **how)


def the_line(result: Result) -> str:
    """The one line of a command that has failed as it should."""
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code in (1, 2)
    lines = [line for line in result.stderr.splitlines() if line != "starting the towers ..."]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert len(lines[0]) < 700
    assert lines[0].isprintable()
    return lines[0]


def number_options() -> Iterator[tuple[str, list[str], str]]:
    """Every option of every command that takes a number, with the arguments before it."""
    before = {
        "batch": ["in.jsonl", "out.jsonl"],
        "eval": ["--tasks", "x"],
        "generate": ["x"],
        "sweep": ["in.jsonl"],
        "verify": [TINY],
        "quantize": [TINY, "out"],
        "train": ["out"],
    }
    for registered in app.registered_commands:
        assert registered.callback is not None
        name = registered.name or registered.callback.__name__
        for parameter, kind in get_type_hints(registered.callback).items():
            if {int, float} & {kind, *get_args(kind)}:
                yield name, before.get(name, []), f"--{parameter.replace('_', '-')}"
    for action in _parser("twotower bench")._actions:
        if action.type in (int, float):
            yield "bench", [], action.option_strings[0]


def test_there_are_options_to_try() -> None:
    found = [(name, option) for name, _, option in number_options()]
    assert len(found) > 40
    with_numbers = {"batch", "eval", "sweep", "serve", "generate", "train", "plan", "bench", "top"}
    assert {name for name, _ in found} == with_numbers


@pytest.mark.parametrize(("command", "before", "option"), list(number_options()))
def test_what_is_no_number_is_refused_by_name(command: str, before: list[str], option: str) -> None:
    for value in NO_NUMBERS:
        field = option[2:].replace("-", "_")
        # A number that is too large for a float is one all the same, and out of limits.
        assert field in the_line(invoke([command, *before, option, value])).replace("-", "_")


SERVE, GENERATE = ["serve", "--model", TINY], ["generate", "x"]
REMOTE = [*GENERATE, "--target", "127.0.0.1:1"]
BATCH = ["batch", "in.jsonl", "out.jsonl"]
TRAIN, BENCH = ["train", "out", "--corpus", "empty_folder"], ["bench", "--minutes", "1e-9"]
CASES: list[tuple[list[str], str]] = [
    # Devices.
    *[
        ([*GENERATE, "--device", device], f"device: got '{shown}', expected cpu")
        for device, shown in (
            ("foo", "foo"),
            ("", ""),
            ("meta", "meta"),
            ("mps", "mps"),
            ("cpu:7", "cpu:7"),
            ("é", "é"),
            ("cuda:99999999999999", "cuda:99999999999999"),
        )
    ],
    (["verify", TINY, "--device", "foo"], "device: got 'foo', expected cpu"),
    (["quantize", TINY, "out", "--device", "foo"], "device: got 'foo', expected cpu"),
    ([*BENCH, "--device", "foo"], "device: got 'foo', expected cpu"),
    ([*BENCH, "--device", "cpu:3"], "device: got 'cpu:3', expected cpu"),
    ([*SERVE, "--device", "foo"], "device"),
    # Batch jobs.
    (["batch", "in.jsonl"], "paths: got one, expected the input and the output"),
    (["batch", "none.jsonl", "out.jsonl"], "none.jsonl"),
    (["batch", "file", "out.jsonl"], "file"),
    ([*BATCH, "--pairs", "3:1"], "--pairs: got '3:1'"),
    ([*BATCH, "--callers", "x"], "--callers: got 'x'"),
    ([*BATCH, "--param", "top_k"], "--param: got 'top_k', expected NAME=VALUE"),
    ([*BATCH, "--param", "top_k=NaN"], "top_k"),
    ([*BATCH, "--concurrency", "0"], "concurrency: got 0, expected 1 to"),
    ([*BATCH, "--seed", "-1"], "seed: got -1"),
    ([*BATCH, "--patience", "nan"], "patience: got nan"),
    ([*BATCH, "--format", "csv"], "format"),
    ([*BATCH, "--target", "x", "--model", "y"], "--target asks a running service"),
    ([*BATCH, "--target", "x", "--pairs", "2"], "--target asks a running service"),
    ([*BATCH, "--target", "http://u:secret@x"], "target: got"),
    ([*BATCH, "--param", "seed=1"], "--param: got seed"),
    ([*BATCH, "--max-tokens", "4", "--param", "max_tokens=5"], "--param: got max_tokens"),
    (["batch", "in.jsonl", "-"], "output: got '-'"),
    (["batch", "in.jsonl", "in.jsonl"], "beside the output"),
    ([*BATCH, "--target", "http://127.0.0.1:1"], "http://127.0.0.1:1"),
    ([*BATCH, "--config", "broken.yaml"], "broken.yaml"),
    # Numbers out of their limits.
    *[
        ([*GENERATE, option, value], f"{option[2:].replace('-', '_')}: got ")
        for option, value in (
            ("--max-tokens", "-1"),
            ("--block-size", LARGE),
            ("--block-size", HUGE),
            ("--steps-per-block", "0"),
            ("--top-k", "-1"),
            ("--seed", "-1"),
            ("--draft-steps", HUGE),
            ("--min-tokens", HUGE),
            ("--min-steps-per-block", HUGE),
            ("--confidence-threshold", "nan"),
            ("--confidence-threshold", "1e400"),
            ("--temperature", "nan"),
            ("--temperature", "inf"),
            ("--temperature", "-1"),
            ("--top-p", "0"),
            ("--min-p", "nan"),
            ("--min-confidence-threshold", "nan"),
        )
    ],
    ([*GENERATE, "--max-tokens", HUGE], "max_tokens: got "),
    *[
        ([*GENERATE, option, value], f"{option[2:].replace('-', '_')}: got '{value}', expected one")
        for option, value in (
            ("--mode", "fast"),
            ("--quality", ""),
            ("--draft-source", "é"),
            ("--acceptance", "lossless"),
            ("--commit-rule", "rightmost"),
            ("--first-token", "none"),
        )
    ],
    ([*GENERATE, "--mix-ratio", "nan"], "mix_ratio: got nan"),
    ([*GENERATE, "--mix-ratio", "1.5"], "mix_ratio: got 1.5"),
    *[
        (
            [*REMOTE, option, value],
            f"{option[2:].replace('-', '_')}: got {value}, expected a whole number of at least -",
        )
        for option, value in (
            ("--max-tokens", LARGE),
            ("--max-tokens", f"-{LARGE}"),
            ("--block-size", HUGE),
            ("--steps-per-block", LARGE),
            ("--top-k", LARGE),
            ("--draft-steps", LARGE),
            ("--min-tokens", LARGE),
            ("--min-steps-per-block", LARGE),
            ("--seed", HUGE),
        )
    ],
    *[
        ([*SERVE, option, value], f"{field}: ")
        for option, field, value in (
            ("--grpc-port", "grpc_port", "0"),
            ("--grpc-port", "grpc_port", "65536"),
            ("--http-port", "http_port", "-1"),
            ("--threads", "num_threads", "0"),
            ("--threads", "num_threads", LARGE),
            ("--max-context", "max_context", HUGE),
            ("--max-num-seqs", "max_num_seqs", LARGE),
            ("--max-queued-requests", "max_queued_requests", "-2"),
            ("--max-queued-requests", "max_queued_requests", LARGE),
            ("--prefix-cache-mib", "prefix_cache_mib", HUGE),
            ("--memory-fraction", "memory_fraction", "nan"),
            ("--memory-fraction", "memory_fraction", "0"),
            ("--pairs", "num_pairs", "0"),
            ("--pairs", "num_pairs", HUGE),
        )
    ],
    ([*SERVE, "--grpc-port", "9123", "--http-port", "9123"], "http_port: got 9123 for both"),
    ([*SERVE, "--pairs", "9999"], "no room for num_pairs = 9999: 9999 pairs x 0.9 CPU + "),
    *[
        ([*TRAIN, option, value], f"{option[2:].replace('-', '_')}: got ")
        for option, value in (
            ("--context-steps", "0"),
            ("--denoiser-steps", HUGE),
            ("--threads", "-1"),
            ("--threads", LARGE),
            ("--seed", "-1"),
            ("--seed", HUGE),
            ("--context-minutes", "nan"),
            ("--denoiser-minutes", "-1"),
            ("--denoiser-minutes", "inf"),
        )
    ],
    *[
        ([*BENCH, option, value], f"{option[2:].replace('-', '_')}: got ")
        for option, value in (
            ("--context", "0"),
            ("--context", LARGE),
            ("--long-context", HUGE),
            ("--long-rows", LARGE),
            ("--rounds", HUGE),
            ("--repeats", "0"),
            ("--scans", "-1"),
            ("--scan-rows", LARGE),
            ("--batches", HUGE),
            ("--batches", ","),
            ("--seed", "-1"),
            ("--seed", HUGE),
            ("--minutes", "nan"),
            ("--minutes", "inf"),
            ("--unique", "nan"),
            ("--profiles", "é"),
            ("--sections", "é"),
        )
    ],
    *[
        (["plan", option, value], f"{option[2:].replace('-', '_')}: got ")
        for option, value in (
            ("--context", "0"),
            ("--batch", "-1"),
            ("--output-tokens", HUGE),
            ("--most-denoisers", "0"),
            ("--gamma", "nan"),
            ("--tokens-per-nfe", "inf"),
            ("--gpu", "é"),
            ("--text", ""),
            ("--experts", "x" * 5000),
        )
    ],
    (["plan", "--batch", HUGE], "nothing fits"),
    # Models that are none.
    *[
        ([*command, model], named)
        for command in (
            ["plan", "--model"],
            ["serve", "--model"],
            [*GENERATE, "--model"],
        )
        for model, named in (
            ("", "not a folder, nor a hub id"),
            ("no-such-folder", "not a folder, nor a hub id"),
            ("x" * 5000, "not a folder's name"),
            ("a\nb", "not a folder, nor a hub id"),
            ("~nobody-of-this-name/x", "not a folder"),
            ("é/é", "é/é: could not be fetched"),
            ("empty_folder", "config.json"),
        )
    ],
    # Services that are none.
    *[
        ([*GENERATE, "--target", target], f"target: got '{target}', expected host:port")
        for target in ("", "127.0.0.1", "127.0.0.1:-1", "host:99999", "host:", "::1", "é:9000")
    ],
    # Files.
    *[
        (["serve", "--config", name], named)
        for name, named in (
            ("", "--config"),
            ("no-such-file", "'no-such-file' does not exist"),
            (".", "is a directory"),
            ("bytes.yaml", "bytes.yaml: unreadable"),
            ("broken.yaml", "broken.yaml: unreadable"),
            ("digits.yaml", "digits.yaml: unreadable"),
            ("deep.yaml", "deep.yaml: unreadable"),
            ("list.yaml", "list.yaml: expected a mapping"),
            ("hex.yaml", "max_num_seqs"),
            ("unknown.yaml", "max_rows"),
            ("nan.yaml", "stall_timeout_s"),
            ("inf.yaml", "health_check_period_s"),
            ("nul.yaml", "not a folder"),
        )
    ],
    *[
        (["plan", "--measured", name], named)
        for name, named in (
            ("no-such-file", "'no-such-file' does not exist"),
            (".", "expected a folder with .json files"),
            ("file", "measured: file is not readable"),
            ("bytes.yaml", "measured: bytes.yaml is not readable"),
        )
    ],
    (["verify", "no-such-folder"], "'no-such-folder' does not exist"),
    (["verify", "file"], "'file' is a file"),
    (["verify", "empty_folder"], "manifest.json"),
    (["quantize", TINY, "file/out"], "file: is a file, expected a folder"),
    (["quantize", TINY, "x" * 300], "File name too long"),
    (["quantize", "", "out"], "not a folder, nor a hub id"),
    (["train", "out", "--corpus", "file"], "corpus: got file, expected a folder"),
    (["train", "out", "--corpus", "no-such"], "corpus: got no-such, expected a folder"),
    (["train", "out", "--start-from", "empty_folder"], "start_from: got empty_folder, expected"),
    (["train", "out", "--draft-share", "1.1"], "draft_share: got 1.1, expected 0 to 1"),
    (["train", "out", "--own-block-share", "0.6"], "own_block_share: got 0.6 beside an own_text"),
    (["train", "out", "--position-decay", "0"], "position_decay: got 0.0, expected above 0"),
    (["train", "out", "--rate", "0"], "rate: got 0.0, expected above 0 and at most 10"),
    (TRAIN, "corpus: got 0 .py files to train on and 0 to hold out"),
    (["train", "file", "--corpus", "empty_folder"], "file: File exists"),
    ([*TRAIN, "--work-dir", "file/x"], "file/x: Not a directory"),
    *[
        ([*BENCH, option, name], reason)
        for option in ("--out", "--table", "--plot")
        for name, reason in (
            ("file/x", "'file/x': File exists"),
            (".", ".: is a folder"),
        )
    ],
    *[
        ([*BENCH, option, "x" * 300 + "/y"], "xxx...: File name too long")
        for option in ("--out", "--table", "--plot")
    ],
    # Commands and arguments that are none.
    (["nonsense"], "No such command 'nonsense'"),
    (["generate"], "Missing argument 'prompt'"),
    (["generate", "x", "--nonsense"], "No such option: --nonsense"),
    (["bench", "--nonsense"], "unrecognized arguments: --nonsense"),
    (["generate", "a\udcff"], "argument 2: got 'a\\udcff', expected UTF-8"),
    ([*GENERATE, "--stop", "\udcff"], "--stop: got '\\udcff', expected UTF-8"),
    ([*GENERATE, "--target=a\udcff"], "--target: got 'a\\udcff', expected UTF-8"),
    ([*GENERATE, "--stop", "\udcff" * 9000], "..., expected UTF-8"),
    ([*GENERATE, "--target", "x" * 9000], "..., expected host:port"),
    ([*GENERATE, "--seed", HUGE], f"seed: got {HUGE}, expected a whole number of at least 0, at "),
]


@pytest.mark.parametrize(
    ("arguments", "named"),
    CASES,
    ids=[" ".join(ascii(part)[1:-1][:24] for part in given) for given, _ in CASES],
)
def test_one_line_names_what_was_wrong(arguments: list[str], named: str) -> None:
    assert named in the_line(invoke(arguments))


def test_gpus_that_are_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    for count, device, expected in (
        (0, "cuda", "expected cpu: 0 GPUs are here"),
        (1, "cuda:1", "expected cuda:0: 1 GPUs are here"),
        (4, "cuda:7", "expected cuda:0 to cuda:3: 4 GPUs are here"),
    ):
        monkeypatch.setattr("torch.cuda.device_count", lambda count=count: count)
        for command in (["generate", "x"], ["verify", TINY], ["bench"]):
            line = the_line(invoke([*command, "--device", device]))
            assert f"device: got '{device}', {expected}" in line


def test_a_port_that_somebody_has() -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = the_line(invoke([*SERVE, "--grpc-port", str(port)]))
    assert f"port: {port} is in use" in line


@pytest.mark.parametrize("raised", [UnicodeEncodeError("ascii", "é", 0, 1, "no"), TypeError("x")])
def test_a_hub_that_cannot_be_asked(raised: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    line = the_line(invoke([*GENERATE, "--model", "owner/name"]))
    assert f"owner/name: could not be asked for ({type(raised).__name__}); look at" in line


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_TOKEN", "hf_secret\nmore"),
        ("HF_TOKEN", "hf_sécret"),
        ("https_proxy", "http://é\udcff:x"),
        ("https_proxy", "nonsense"),
        ("https_proxy", "http://127.0.0.1:1"),
    ],
)
def test_tokens_and_proxies_that_no_header_holds(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants, utils

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "cache")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv(name, value)
    utils.close_session()
    try:
        line = the_line(invoke([*GENERATE, "--model", "owner/name"]))
    finally:
        utils.close_session()
    assert line.startswith("error: owner/name: could not be ")
    assert "cret" not in line


def test_stdin_that_is_no_text() -> None:
    line = the_line(invoke(["generate", "-"], input=b"abc\xff"))
    assert "prompt: got byte 0xff at 3 of stdin, expected UTF-8" in line


def test_stdin_that_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twotower.cli.generate.standard_input", _with_stdin_closed(monkeypatch))
    assert "stdin closed" in the_line(invoke(["generate", "-"]))


def _with_stdin_closed(monkeypatch: pytest.MonkeyPatch) -> Any:
    read = standard_input

    def closed() -> str:
        monkeypatch.setattr(sys, "stdin", None)
        return read()

    return closed


def failing_plan(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> Result:
    def plan(*_: Any) -> None:
        raise error

    monkeypatch.setattr("twotower.cli.commands.plan", plan)
    return invoke(["plan"])


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "out"), 1, "out: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device"),
        (MemoryError(), 1, "not enough memory (no more)"),
        (RuntimeError("can't allocate memory: you tried\nmore"), 1, "not enough memory (can't all"),
        (ValueError("a\x1b[2J\nb" + "x" * 9000), 2, "a\\x1b[2J\\nbxxx"),
    ],
)
def test_what_can_happen_to_a_command(
    error: Exception, code: int, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = failing_plan(monkeypatch, error)
    assert the_line(result).startswith(f"error: {line}")
    assert result.exit_code == code


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(failing_plan(monkeypatch, KeyError("x")).exception, KeyError)


def test_ctrl_c_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    result = failing_plan(monkeypatch, KeyboardInterrupt())
    assert (result.exit_code, result.stderr, result.stdout) == (130, "interrupted\n", "")


def test_a_reader_that_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    result = failing_plan(monkeypatch, BrokenPipeError(errno.EPIPE, "Broken pipe"))
    assert (result.exit_code, result.stderr) == (1, "")


def test_characters_that_the_terminal_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("twotower.cli.commands.plan", lambda *_: write("é"))
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(SystemExit) as ended:
        typer.main.get_command(app).main(["plan"])
    assert ended.value.code == 0
    assert out.buffer.getvalue() == b"\\xe9"  # type: ignore[attr-defined]


@pytest.mark.parametrize("redirected", ["| head -c 1 >/dev/null", ">&-", "> /dev/full"])
def test_outputs_that_take_nothing(redirected: str) -> None:
    """In a shell, to the end of the interpreter, which writes what is left once more."""
    command = f"{sys.executable} -m twotower.cli plan {redirected}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    want = "error: No space left on device\n" if "full" in redirected else ""
    assert done.stderr == want
    assert done.returncode == (1 if want else 0)


def test_no_arguments_are_a_question_for_help() -> None:
    result = invoke([])
    assert "Usage" in result.output
    assert "generate" in result.output


def test_the_codes_are_those_of_the_description() -> None:
    assert (cli_errors.WRONG, cli_errors.UNWRITTEN, cli_errors.INTERRUPTED) == (2, 1, 130)
    assert os.EX_OK == 0
