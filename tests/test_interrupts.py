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
from twotower.interrupts import run_to_end

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


async def test_results_and_errors_come_out_of_a_running_loop() -> None:
    async def work(value: Any) -> Any:
        await asyncio.sleep(0)
        if isinstance(value, Exception):
            raise value
        return value

    lock = threading.Lock()
    assert run_to_end(work(7), lock) == 7
    assert run_to_end(work(None), lock) is None
    with pytest.raises(ZeroDivisionError, match="own"):
        run_to_end(work(ZeroDivisionError("own")), lock)
    assert not lock.locked()


async def test_an_interrupted_call_holds_the_model_until_it_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A second Ctrl-C does not wait for the pass; the next call does."""
    cleaned, go_on = threading.Event(), threading.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            # A pass that still runs.
            go_on.wait(10)
            cleaned.set()

    lock = threading.Lock()
    waited = threading.Event.wait

    def interrupted_wait(event: threading.Event, timeout: float | None = None) -> bool:
        if threading.current_thread() is threading.main_thread() and event not in (cleaned, go_on):
            if not waited(event, 0.05):
                raise KeyboardInterrupt
            return True
        return waited(event, timeout)

    monkeypatch.setattr(threading.Event, "wait", interrupted_wait)
    with pytest.raises(KeyboardInterrupt):
        run_to_end(work(), lock)
    monkeypatch.undo()
    assert not cleaned.is_set()
    assert lock.locked()
    go_on.set()
    assert cleaned.wait(10)
    assert lock.acquire(timeout=10)


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
