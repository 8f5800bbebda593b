"""The command line: help without torch, text on stdout, figures and errors on stderr."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from twotower.cli import app

GOLDEN = Path(__file__).parent / "golden"


def test_help_needs_no_heavy_import() -> None:
    program = (
        "import sys, twotower.cli\n"
        "from typer.testing import CliRunner\n"
        "result = CliRunner().invoke(twotower.cli.app, ['--help'])\n"
        "assert result.exit_code == 0, result.output\n"
        "heavy = {'torch', 'ray', 'transformers', 'grpc'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "print(result.output)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    for word in ("serve", "generate", "verify", "train"):
        assert word in done.stdout


@pytest.mark.parametrize("command", ["serve", "generate", "verify", "train"])
def test_each_command_explains_itself(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert len(result.output.splitlines()) > 5


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["generate", "x", "--max-tokens", "0"], "max_tokens: got 0"),
        (["generate", "x", "--mode", "beam"], "mode: got 'beam'"),
        (["generate", "x", "--dtype", "int8"], "dtype: got 'int8'"),
        (["generate", "x", "--model", str(GOLDEN / "tiny_a")], "a model that has a tokenizer"),
        (["generate", "x", "--model", "no-such-folder"], "no-such-folder"),
        (["generate", "x", "--target", "127.0.0.1:1"], "UNAVAILABLE"),
        (["serve", "--max-num-seqs", "0"], "max_num_seqs"),
        (["verify", str(GOLDEN)], "error: "),
    ],
)
# Ray itself warns when it is imported for the first time, which another test may have done before.
@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")
def test_errors_are_one_line(arguments: list[str], named: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert named in result.stderr
    assert "Traceback" not in result.output


def test_verify_reports_every_case() -> None:
    result = CliRunner().invoke(app, ["verify", str(GOLDEN / "tiny_a"), "--dtype", "float32"])
    assert result.exit_code == 0, result.output
    assert len(result.output.splitlines()) > 2
