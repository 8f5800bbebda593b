"""The process around the service: signals, deaths below it, and that nothing is left.

Each case is a program of its own that supervises a script in place of the service; `sleep` under
another name stands for a program of Ray's.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

PROGRAM = """
import os, signal, subprocess, sys, time
from twotower.deployments.server import supervisor

supervisor.STOP_MARGIN_S, supervisor.LOST_PATIENCE_S = 0.5, 0.5

def start(*command):
    process = subprocess.Popen(command, start_new_session=True)
    print(process.pid, flush=True)
    return process

def work(ready):
    print(os.getpid(), flush=True)
    {work}

with supervisor.held_signals() as held:
    code = supervisor.supervise(work, 0.5, held)
print("code", code, flush=True)
sys.exit(code)
"""
STOPS_WELL = """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    ready()
    print("ready", flush=True)
    time.sleep(60)
"""
HANGS = """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ready()
    print("ready", flush=True)
    time.sleep(60)
"""
NOT_READY = """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("ready", flush=True)
    time.sleep(60)
"""
LIMIT_S = 10


class Program:
    """A running program and what it has printed: process ids, and a last line."""

    def __init__(
        self, work: str, environ: dict[str, str] | None = None, program: str = PROGRAM
    ) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", program.replace("{work}", work.strip())],
            env={**os.environ, **(environ or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.below: list[int] = []

    def await_ready(self) -> None:
        for line in self._lines():
            if line == "ready":
                return
            self.below.append(int(line))
        raise AssertionError(self.process.communicate()[1])

    def end(self, code: int) -> str:
        """Waits for its end with a code and nothing left; returns what stderr got."""
        assert self.process.wait(LIMIT_S) == code
        # At once, unless it was killed itself: then what was below it is about to follow.
        left = [one for one in self.below if alive(one)]
        out, errors = self.process.communicate(timeout=LIMIT_S)
        self.below += [int(line) for line in out.split("\n") if line.isdigit()]
        assert code == -signal.SIGKILL or left == []
        assert self.below
        await_gone(self.below)
        return errors

    def _lines(self) -> Iterator[str]:
        stdout: IO[str] | None = self.process.stdout
        assert stdout is not None
        return (line.strip() for line in iter(stdout.readline, ""))


def alive(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


def running(process: int) -> bool:
    """Whether it still does anything. One that has ended and was killed together with its parent
    waits for the machine's first process to take its code, which may be busy."""
    try:
        stat = Path(f"/proc/{process}/stat").read_bytes()
    except OSError:
        return False
    return stat.rpartition(b")")[2].split()[0] != b"Z"


def await_gone(processes: list[int]) -> None:
    begin = time.monotonic()
    while left := [one for one in processes if running(one)]:
        assert time.monotonic() - begin < 5, left
        time.sleep(0.02)


@pytest.fixture
def raylet(tmp_path: Path) -> Path:
    """A program that has this name and does nothing."""
    return Path(shutil.copy(shutil.which("sleep") or "", tmp_path / "raylet"))


@pytest.mark.parametrize("code", [0, 2, 7])
def test_the_works_own_code_and_output_are_passed_on(code: int) -> None:
    program = Program(f"print('said', file=sys.stderr); return {code}")
    assert program.end(code) == "said\n"


def test_an_error_is_shown_and_fails() -> None:
    errors = Program("raise RuntimeError('broken')").end(1)
    assert errors.endswith("RuntimeError: broken\n")


@pytest.mark.parametrize("ready", ["", "ready(); "])
@pytest.mark.parametrize(
    ("error", "shown"),
    [
        ("InvalidRequestError('field', 7, 'less')", "InvalidRequestError: field: got 7, expected"),
        ("UnavailableError('no towers')", "UnavailableError: no towers"),
        ("OSError(28, 'No space left', '/x')", "OSError: [Errno 28] No space left: '/x'"),
        ("Odd(1, 2)", "ValueError: odd"),
    ],
)
def test_errors_for_the_user_are_raised_again(ready: str, error: str, shown: str) -> None:
    """By the parent, which has the words for them."""
    raising = PROGRAM.replace(
        "def work",
        "from twotower.towers.errors import *\n"
        "class Odd(ValueError):\n"
        "    def __init__(self, a, b):\n"
        "        super().__init__('odd')\n"
        "def work",
    ).replace("    code = ", "    print(os.getpid(), flush=True)\n    code = ")
    errors = Program(f"{ready}raise {error}", program=raising).end(1)
    assert shown in errors.splitlines()[-1]
    assert errors.count("Traceback") == 1
    assert "in supervise" in errors


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_a_ready_service_well(kind: signal.Signals) -> None:
    program = Program("start('sleep', '60')" + STOPS_WELL)
    program.await_ready()
    program.process.send_signal(kind)
    assert program.end(0) == ""


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_one_that_is_not_ready_at_once(kind: signal.Signals) -> None:
    program = Program("start('sleep', '60')" + NOT_READY)
    program.await_ready()
    program.process.send_signal(kind)
    assert program.end(128 + kind) == ""


def test_a_signal_before_the_start_is_not_lost() -> None:
    early = PROGRAM.replace("code = ", "os.kill(os.getpid(), signal.SIGTERM); code = ")
    program = Program("time.sleep(60)", program=early)
    program.below.append(program.process.pid)
    assert program.end(128 + signal.SIGTERM) == ""


def test_one_that_hangs_is_ended_after_the_grace_time() -> None:
    program = Program("start('sleep', '60')" + HANGS)
    program.await_ready()
    begin = time.monotonic()
    program.process.terminate()
    assert program.end(1) == "error: the service has not stopped within 1 s\n"
    assert 1 <= time.monotonic() - begin < 5


def test_one_that_is_stopped_by_sigstop_is_ended_too() -> None:
    program = Program("start('sleep', '60')" + STOPS_WELL)
    program.await_ready()
    os.kill(program.below[0], signal.SIGSTOP)
    program.process.terminate()
    assert program.end(1) == "error: the service has not stopped within 1 s\n"


def test_a_second_ctrl_c_does_not_wait() -> None:
    program = Program(HANGS)
    program.await_ready()
    program.process.terminate()
    time.sleep(0.2)
    program.process.send_signal(signal.SIGINT)
    assert program.end(128 + signal.SIGINT) == ""


@pytest.mark.parametrize("state", [HANGS, STOPS_WELL])
def test_the_death_of_a_program_of_rays_is_noticed(raylet: Path, state: str) -> None:
    program = Program(f"start({str(raylet)!r}, '60')" + state)
    program.await_ready()
    time.sleep(0.5)
    os.kill(program.below[1], signal.SIGKILL)
    begin = time.monotonic()
    lost = f"error: a process that the service needs has ended: raylet ({program.below[1]})\n"
    assert program.end(1) == lost
    assert time.monotonic() - begin < 5


def test_while_it_starts_too(raylet: Path) -> None:
    program = Program(f"start({str(raylet)!r}, '60')" + NOT_READY, {"RAY_odd": "?", "GRPC_X": "1"})
    program.await_ready()
    time.sleep(0.5)
    os.kill(program.below[1], signal.SIGKILL)
    errors = program.end(1)
    assert "raylet" in errors
    names = [word.strip("(),\n") for word in errors.split()]
    assert {"RAY_odd", "GRPC_X"} <= set(names)
    assert errors.count("\n") == 1


def test_work_that_fails_because_of_it_has_its_own_word(raylet: Path) -> None:
    """Ray is ended by the service itself when its start fails."""
    work = f"raylet = start({str(raylet)!r}, '60'); time.sleep(0.6); raylet.kill(); raylet.wait()"
    program = Program(f"{work}; time.sleep(0.3); print('reason', file=sys.stderr); return 2")
    assert program.end(2) == "reason\n"


def test_all_told_to_end_at_once(raylet: Path) -> None:
    """As systemd does: SIGTERM for the raylet, too, without which nothing ends well."""
    program = Program(f"start({str(raylet)!r}, '60')" + HANGS)
    program.await_ready()
    time.sleep(0.5)
    for process in (program.process.pid, *program.below):
        os.kill(process, signal.SIGTERM)
    assert program.end(128 + signal.SIGTERM) == ""


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSEGV])
def test_the_death_of_the_work_is_said(kind: signal.Signals) -> None:
    program = Program("start('sleep', '60')" + STOPS_WELL)
    program.await_ready()
    os.kill(program.below[0], kind)
    assert program.end(1) == f"error: the service's process was ended by {kind.name}\n"


def test_the_work_does_not_outlive_the_one_who_watches_it() -> None:
    program = Program(HANGS)
    program.await_ready()
    program.process.kill()
    program.end(-signal.SIGKILL)


def test_who_has_watched_takes_in_no_orphans_afterwards() -> None:
    """Nobody would wait for them, and they would stay in the table of processes."""
    program = """
import ctypes, signal, sys
from twotower.deployments.server import supervisor

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
with supervisor.held_signals() as held:
    assert supervisor.supervise(lambda ready: 3, 0.5, held) == 3
takes_in = ctypes.c_int(-1)
PR_GET_CHILD_SUBREAPER = 37
assert ctypes.CDLL(None).prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(takes_in), 0, 0, 0) == 0
print(takes_in.value, signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 True\n", "")


def test_orphans_of_orphans_are_found() -> None:
    family = "for i in 1 2 3; do (setsid sh -c 'sleep 60 & sleep 60 & wait' &) ; done; wait"
    program = Program(f"start('sh', '-c', {family!r})" + STOPS_WELL)
    program.await_ready()
    time.sleep(0.3)
    assert len(sleepers(program.process.pid)) == 6
    os.kill(program.below[0], signal.SIGKILL)
    program.end(1)
    assert sleepers(program.process.pid) == []


def sleepers(process: int) -> list[int]:
    """Processes called sleep below a process."""
    listed = subprocess.run(
        ["ps", "-eo", "pid=,ppid=,comm="], capture_output=True, text=True, check=True
    )
    rows = [line.split(None, 2) for line in listed.stdout.splitlines()]
    parents = {int(pid): int(parent) for pid, parent, _ in rows}

    def below(one: int) -> bool:
        return one == process or (one in parents and below(parents[one]))

    return [int(pid) for pid, _, name in rows if name == "sleep" and below(int(pid))]


def test_nohup_is_respected() -> None:
    ignoring = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)" + PROGRAM
    work = "ready(); print('ready', flush=True); time.sleep(0.5); return 0"
    program = Program(work, program=ignoring)
    program.await_ready()
    program.process.send_signal(signal.SIGHUP)
    assert program.end(0) == ""
