"""`twotower` in a real pseudo terminal, and in pipes that get what they always got."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.terminal import run_in_terminal
from twotower import TwoTower

ROOT = Path(__file__).parents[2]
GENERATE = ["twotower.cli", "generate", "def main():", "--max-tokens", "96", "--seed", "1"]
COST = r"96 tokens, \d+ NFE, \d+\.\d\d tokens/NFE, \d+\.\d tokens/s, seed 1"


@pytest.fixture(scope="module")
def text() -> str:
    """What the model in this process writes, without any command."""
    return TwoTower.from_pretrained().generate(["def main():"], max_tokens=96, seed=1)[0].text


def rows_of(text: str, columns: int) -> list[str]:
    """The rows of a terminal that is given the text."""
    return [
        line[at : at + columns].rstrip()
        for line in text.split("\n")
        for at in range(0, max(1, len(line)), columns)
    ]


def test_a_terminal_ends_with_the_text_once(text: str) -> None:
    ended = run_in_terminal(GENERATE)
    assert ended.code == 0
    want = rows_of(text, 60)
    lines = ended.screen.all_lines()
    assert lines[: len(want)] == want
    assert re.fullmatch(COST, "".join(lines[len(want) :]))
    assert not ended.screen.cursor_is_hidden
    # It was a display: masks and the figures of a block were there.
    assert "░" in ended.sent.decode()
    assert b"tokens/s, mask_diffusion" in ended.sent


def test_a_terminal_gets_text_alone_when_asked(text: str) -> None:
    ended = run_in_terminal([*GENERATE, "--plain"])
    assert ended.code == 0
    sent = ended.sent.decode().replace("\r\n", "\n")
    assert sent.startswith(f"{text}\n")
    assert re.fullmatch(f"{COST}\n", sent.removeprefix(f"{text}\n"))


def test_pipes_get_the_text_and_the_cost(text: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *GENERATE],
        cwd=ROOT,
        capture_output=True,
        env={**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color"},
        timeout=60,
        check=True,
    )
    assert done.stdout == text.encode()
    assert re.fullmatch(f"\n{COST}\n", done.stderr.decode())


def test_ctrl_c_gives_the_terminal_back() -> None:
    pressed = []

    def watch(sent: bytes, _: object, reader: int) -> None:
        if not pressed and b"tokens/pass" in sent:
            pressed.append(os.write(reader, b"\x03"))

    command = [*GENERATE[:3], "--max-tokens", "1500", "--steps-per-block", "16", "--ignore-eos"]
    ended = run_in_terminal([*command, "--block-size", "16"], watch=watch)
    assert pressed
    assert ended.code == 130
    assert not ended.screen.cursor_is_hidden
    lines = ended.screen.lines()
    assert lines[-1] == "interrupted"
    # Nothing of what was drawn in place.
    assert not any("░" in line or "tokens/s" in line for line in lines)


def test_a_new_size_while_it_writes(text: str) -> None:
    """The terminal is made narrower and wider again in the middle."""
    import fcntl
    import struct
    import termios

    sizes = [(30, 12), (80, 30), (60, 20)]

    def watch(sent: bytes, _: object, reader: int) -> None:
        if sizes and b"tokens/pass" in sent:
            columns, rows = sizes.pop(0)
            fcntl.ioctl(reader, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    ended = run_in_terminal(GENERATE, watch=watch)
    assert sizes == []
    last = text.rsplit("\n", 1)[1].strip()
    assert last
    shown = "\n".join(ended.screen.lines())
    assert shown.count("tokens/s") == 1
