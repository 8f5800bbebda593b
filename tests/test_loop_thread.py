"""Ctrl-C ends a call within a pass, wherever it waits, and the model goes on to work."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from twotower import TwoTower
from twotower.loop_thread import LoopThread

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tests" / "golden" / "tiny_a"
LIMIT_S = 1.0

# A call that takes far longer than the test, in the surroundings that are named.
PROGRAM = """
import asyncio, signal, sys, threading, time
from pathlib import Path
import torch
from twotower import TwoTower
from twotower.towers.engine.load import load_engines

torch.set_num_threads(1)
engines = load_engines(Path(sys.argv[2]), "cpu", "cpu", torch.float32)
model = TwoTower(*engines, None)
alone = model.generate([[5, 6, 7]], max_tokens=20, seed=1)[0].token_ids

def long_call():
    print("begun", flush=True)
    for _ in range(1000):
        model.generate([[5, 6, 7 + row] for row in range(64)], max_tokens=900, mode=sys.argv[3])

def interrupted():
    try:
        long_call()
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        rows = [engine.num_rows for engine in engines]
        again = model.generate([[5, 6, 7]], max_tokens=20, seed=1)[0].token_ids
        print(*rows, again == alone, flush=True)

async def cell():
    interrupted()

kind = sys.argv[1]
if kind == "script":
    interrupted()
elif kind == "loop":
    asyncio.run(cell())
elif kind == "notebook":
    # As a notebook's kernel: a loop of its own, and Python's handler while a cell runs.
    asyncio.new_event_loop().run_until_complete(cell())
elif kind == "await":
    # As its cells with `await`: a handler that asks the loop, which this call holds up.
    handler = lambda *_: None
    handler.__module__ = "ipykernel.kernelbase"
    signal.signal(signal.SIGINT, handler)
    asyncio.new_event_loop().run_until_complete(cell())
    assert signal.getsignal(signal.SIGINT) is handler
elif kind == "thread":
    def bounded():
        print("begun", flush=True)
        model.generate([[5, 6, 7 + row] for row in range(8)], max_tokens=400)
        print("ended", flush=True)
    other = threading.Thread(target=bounded)
    other.start()
    try:
        # Not `join`: interrupted, Python 3.11 takes the thread for one that has ended.
        threading.Event().wait()
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


@contextmanager
def started(kind: str, mode: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", PROGRAM, kind, str(TINY), mode]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        # A call that does not end would have the test wait for a line for ever.
        limit = threading.Timer(30, process.kill)
        limit.start()
        try:
            yield process
        finally:
            limit.cancel()
            process.kill()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("script", "mask_diffusion"),
        ("loop", "mask_diffusion"),
        ("notebook", "verified"),
        ("await", "ar"),
    ],
)
def test_ctrl_c_ends_a_call_at_once(kind: str, mode: str) -> None:
    with started(kind, mode) as process:
        assert line_of(process) == "begun"
        time.sleep(0.4)
        sent = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert line_of(process) == "interrupted"
        assert time.monotonic() - sent < LIMIT_S
        assert line_of(process) == "0 0 True"
        assert process.wait(20) == 0


def test_a_call_in_another_thread_goes_on_and_ends() -> None:
    with started("thread", "-") as process:
        assert line_of(process) == "begun"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert [line_of(process), line_of(process)] == ["interrupted", "ended"]
        assert process.wait(20) == 0


async def work(value: Any) -> Any:
    await asyncio.sleep(0)
    if isinstance(value, Exception):
        raise value
    return value


@pytest.fixture
def loop_thread() -> Iterator[LoopThread]:
    thread = LoopThread()
    yield thread
    thread.close()
    assert not [other for other in threading.enumerate() if other.name == "twotower-loop"]


async def test_results_and_errors_come_out_of_a_running_loop(loop_thread: LoopThread) -> None:
    assert loop_thread.run(work(7)) == 7
    assert loop_thread.run(work(None)) is None
    assert await loop_thread.await_(work(8)) == 8
    with pytest.raises(ZeroDivisionError, match="own"):
        loop_thread.run(work(ZeroDivisionError("own")))
    with pytest.raises(ZeroDivisionError, match="own"):
        await loop_thread.await_(work(ZeroDivisionError("own")))


def test_a_closed_loop_begins_anew(loop_thread: LoopThread) -> None:
    assert loop_thread.run(work(1)) == 1
    loop_thread.close()
    loop_thread.close()
    assert loop_thread.run(work(2)) == 2


class Cleanup:
    """Work without an end, whose cleanup takes until `go_on` is set."""

    def __init__(self) -> None:
        self.begun, self.go_on, self.cleaned = (threading.Event() for _ in range(3))

    async def work(self) -> None:
        self.begun.set()
        try:
            await asyncio.sleep(3600)
        finally:
            # A pass that still runs.
            self.go_on.wait(10)
            self.cleaned.set()


async def test_a_cancelled_call_has_cleaned_up(loop_thread: LoopThread) -> None:
    cleanup = Cleanup()
    call = asyncio.create_task(loop_thread.await_(cleanup.work()))
    while not cleanup.begun.is_set():
        await asyncio.sleep(0.01)
    call.cancel()
    await asyncio.sleep(0.05)
    assert not call.done()
    cleanup.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert cleanup.cleaned.is_set()


@pytest.mark.parametrize("interrupts", [1, 2])
def test_an_interrupted_call_has_cleaned_up_unless_it_is_interrupted_again(
    loop_thread: LoopThread, interrupts: int
) -> None:
    cleanup, main = Cleanup(), threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        cleanup.begun.wait(10)
        for _ in range(interrupts):
            time.sleep(0.1)
            # To the thread that waits, as the system does it for Ctrl-C.
            signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.1)
        if interrupts == 1:
            cleanup.go_on.set()

    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    with pytest.raises(KeyboardInterrupt):
        loop_thread.run(cleanup.work())
    assert cleanup.cleaned.is_set() == (interrupts == 1)
    cleanup.go_on.set()
    assert cleanup.cleaned.wait(10)
    interrupting.join()


def test_a_program_that_handles_ctrl_c_itself_keeps_its_handler(tiny_a: Path) -> None:
    model = TwoTower.from_pretrained(tiny_a)
    seen: list[int] = []

    async def cell() -> int:
        signal.raise_signal(signal.SIGINT)
        timer = threading.Timer(0.05, signal.raise_signal, (signal.SIGINT,))
        timer.start()
        result = model.generate([[5, 6, 7]], max_tokens=300)
        timer.join()
        return len(result[0].token_ids)

    before = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        with closing(asyncio.new_event_loop()) as loop:
            assert loop.run_until_complete(cell()) == 300
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(seen) == 2
