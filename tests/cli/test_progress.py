"""Bars: on a terminal only, only for work that takes long, and gone at its end."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.terminal import Screen, run_in_terminal
from twotower.cli import progress
from twotower.cli.progress import Bar, hub_bars, is_live, restore_terminal, working

TINY = Path(__file__).parents[1] / "golden" / "tiny_a"


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True

    def lines(self, columns: int = 80) -> list[str]:
        screen = Screen(columns, 10)
        screen.feed(self.getvalue().replace("\n", "\r\n").encode())
        return screen.lines()


Attach = Callable[[], Terminal]


@pytest.fixture
def attach(monkeypatch: pytest.MonkeyPatch) -> Attach:
    """Makes stderr and stdout one terminal of 80 columns, on which a bar comes at once. In the test
    itself: pytest sets both anew after the fixtures."""
    stream = Terminal()

    def attached() -> Terminal:
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(sys, "stdout", stream)
        return stream

    for name, value in (("TERM", "xterm-256color"), ("COLUMNS", "80"), ("LINES", "10")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(progress, "SHOWN_AFTER_S", 0.0)
    return attached


def shown(bar: Bar) -> Bar:
    """The bar, once its timer has shown it."""
    until = time.monotonic() + 10.0
    while bar._shown is None:
        assert time.monotonic() < until
        time.sleep(0.005)
    bar._shown.live.auto_refresh = False
    return bar


def drawn(bar: Bar, terminal: Terminal) -> str:
    assert bar._shown is not None
    bar._shown.refresh()
    return terminal.lines()[-1]


@pytest.mark.parametrize(
    ("variables", "live"),
    [
        ({"TERM": "xterm"}, True),
        ({"TERM": "xterm", "NO_COLOR": ""}, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
        ({"TERM": ""}, False),
        ({}, False),
    ],
)
def test_terminals_that_can_be_written_over(
    variables: dict[str, str], live: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_live(Terminal()) is live
    assert not is_live(io.StringIO())
    assert not is_live(None)


def test_short_work_shows_nothing(attach: Attach, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = attach()
    monkeypatch.setattr(progress, "SHOWN_AFTER_S", 30.0)
    before = threading.active_count()
    with working("loading") as bar:
        bar(1, 2)
        bar.note("more")
        bar.say("a line")
    assert terminal.getvalue() == "a line\n"
    assert threading.active_count() <= before + 1


def test_work_that_is_not_to_be_shown(attach: Attach) -> None:
    terminal = attach()
    with working("loading", wanted=False):
        time.sleep(0.05)
    assert terminal.getvalue() == ""


def test_a_pipe_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    monkeypatch.setattr(progress, "SHOWN_AFTER_S", 0.0)
    with working("loading") as bar:
        time.sleep(0.05)
        bar(1, 2)
    restore_terminal()
    assert pipe.getvalue() == ""


def test_a_bar_says_how_far_the_work_is(attach: Attach) -> None:
    terminal = attach()
    with working("measuring") as bar:
        shown(bar)(3, 12, "scans [of] blocks")
        line = drawn(bar, terminal)
        # Brackets are no markup.
        assert line.startswith("measuring: scans [of] blocks ")
        assert " 25%" in line
        bar(6, 12)
        line = drawn(bar, terminal)
        assert line.startswith("measuring ")
        assert " 50%" in line
    assert terminal.lines() == []
    assert terminal.getvalue().count("\x1b[?25l") == terminal.getvalue().count("\x1b[?25h") == 1


def test_pieces_are_counted(attach: Attach) -> None:
    terminal = attach()
    with working("measuring", "pieces") as bar:
        shown(bar)(3, 12, "scans")
        assert " 3/12 " in drawn(bar, terminal)


def test_bytes_have_units(attach: Attach) -> None:
    terminal = attach()
    with working("loading", "bytes") as bar:
        shown(bar)(3 << 20, 12 << 20)
        assert "3.0/12.0 MiB" in drawn(bar, terminal)


def test_a_phase_after_a_phase_begins_anew(attach: Attach) -> None:
    terminal = attach()
    with working("training") as bar:
        shown(bar)(0.5, 1.0, "context")
        assert bar._shown is not None
        (task,) = bar._shown.tasks
        for share in (0.7, 0.9):
            bar(share, 1.0, "context")
        assert task.speed is not None
        bar(0.1, 1.0, "denoiser")
        # The time that is left does not follow from the other phase's speed.
        assert task.speed is None
        line = drawn(bar, terminal)
        assert line.startswith("training: denoiser ")
        assert " 10%" in line


def test_lines_come_above_the_bar_as_they_are(attach: Attach) -> None:
    terminal = attach()
    with working("training") as bar:
        shown(bar)(1, 2)
        line = "step [1]: " + "word " * 20 + "end"
        bar.say(line)
        print("a warning", file=sys.stderr)
        drawn(bar, terminal)
    assert "".join(terminal.lines()[:2]).replace(" ", "") == line.replace(" ", "")
    assert terminal.lines()[2:] == ["a warning"]


def test_lines_of_a_redirected_stdout_stay_there(
    attach: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = attach()
    file = io.StringIO()
    monkeypatch.setattr(sys, "stdout", file)
    with working("training") as bar:
        shown(bar).say("a line")
    assert file.getvalue() == "a line\n"
    assert terminal.lines() == []


def test_an_error_takes_the_bar_away(attach: Attach) -> None:
    terminal = attach()

    def fail() -> None:
        with working("loading") as bar:
            shown(bar)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert terminal.lines() == []
    assert terminal.getvalue().count("\x1b[?25h") == 1


def test_a_bar_that_comes_too_late_does_not_come(attach: Attach) -> None:
    terminal = attach()
    bar = Bar("loading", "share")
    bar.end()
    bar.show()
    assert terminal.getvalue() == ""


def test_a_terminal_is_restored(attach: Attach) -> None:
    terminal = attach()
    sys.stderr.write("\x1b[?25lhalf a bar")
    restore_terminal()
    assert terminal.lines() == []
    assert terminal.getvalue().endswith("\x1b[?25h")


def test_the_hub_shows_its_bars_on_terminals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants
    from huggingface_hub import utils as hub

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", None)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with hub_bars():
        assert hub.are_progress_bars_disabled()
    assert not hub.are_progress_bars_disabled()
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with hub_bars():
        assert not hub.are_progress_bars_disabled()
    # The user's own word goes first.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", False)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with hub_bars():
        assert not hub.are_progress_bars_disabled()


def test_importing_the_commands_brings_no_rich() -> None:
    program = (
        "import sys, twotower.cli.main\n"
        "heavy = {'rich', 'httpx', 'huggingface_hub', 'torch'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], timeout=60, check=True)


def test_verify_on_a_terminal_prints_every_line_once() -> None:
    """With a bar from the first moment on, in a process of its own."""
    program = (
        "import twotower.cli.progress as p; p.SHOWN_AFTER_S = 0.0\n"
        "from twotower.cli.main import main; main()\n"
    )
    ended = run_in_terminal(["verify", str(TINY)], columns=120, rows=40, program=program)
    assert ended.code == 0
    assert b"verifying: " in ended.sent
    lines = ended.screen.all_lines()
    assert lines[-1].endswith("cases hold (tiny_a, cpu, float32)")
    assert len(lines) == len(set(lines)) > 5
    assert not any("verifying" in line for line in lines)
