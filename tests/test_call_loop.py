"""Calls share one event loop; Ctrl-C ends a call within a pass, wherever it waits, and the model
goes on to work."""

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
from twotower.call_loop import CallLoop

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tests" / "golden" / "tiny_a"
LIMIT_S = 3.0

# A call that takes far longer than the test, in the surroundings that are named.
PROGRAM = """
import asyncio, signal, sys, threading, time
import torch
from twotower import TwoTower

torch.set_num_threads(1)
model = TwoTower.from_pretrained(sys.argv[2])
alone = model.generate([[5, 6, 7]], max_tokens=20, seed=1)[0].token_ids

def long_call():
    print("begun", flush=True)
    if sys.argv[1] == "stream":
        for block in model.stream([5, 6, 7], max_tokens=900, mode=sys.argv[3]):
            time.sleep(60)
    if sys.argv[1].endswith("streams"):
        how = {"max_tokens": 900, "mode": sys.argv[3]}
        streams = [model.stream([5, 6, 7 + row], **how) for row in range(64)]
        for blocks in zip(*streams):
            pass
    for _ in range(1000):
        model.generate([[5, 6, 7 + row] for row in range(64)], max_tokens=900, mode=sys.argv[3])

def interrupted():
    try:
        long_call()
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    # Streams that are left are cancelled, and free within a pass.
    limit = time.monotonic() + 0.5
    while model._context.num_rows and time.monotonic() < limit:
        time.sleep(0.01)
    rows = model._context.num_rows, model._denoiser.num_rows
    again = model.generate([[5, 6, 7]], max_tokens=20, seed=1)[0].token_ids
    print(*rows, again == alone, flush=True)

async def cell():
    interrupted()

kind = sys.argv[1]
if kind in ("script", "stream", "streams"):
    interrupted()
elif kind == "exit":
    # Left at the program's end: nothing waits for the rest of the output.
    left = model.stream([5, 6, 7], max_tokens=900)
    next(left)
    print("left", flush=True)
elif kind.startswith("loop"):
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
        ("stream", "mask_diffusion"),
        ("streams", "mask_diffusion"),
        ("loop streams", "verified"),
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


def test_a_stream_that_is_left_does_not_delay_the_end() -> None:
    with started("exit", "-") as process:
        assert line_of(process) == "left"
        left = time.monotonic()
        assert process.wait(20) == 0
        assert time.monotonic() - left < 5 * LIMIT_S


async def value_of(value: Any) -> Any:
    await asyncio.sleep(0)
    if isinstance(value, Exception):
        raise value
    return value


async def test_results_and_errors_come_out_of_a_running_loop() -> None:
    calls = CallLoop()
    assert calls.run(value_of(7)) == 7
    assert calls.run(value_of(None)) is None
    with pytest.raises(ZeroDivisionError, match="mine"):
        calls.run(value_of(ZeroDivisionError("mine")))
    assert not threads_of_calls()


def threads_of_calls() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "twotower-calls"]


def test_calls_in_flight_share_a_loop_and_the_next_ones_get_another() -> None:
    async def loop_of() -> asyncio.AbstractEventLoop:
        await asyncio.sleep(0.02)
        return asyncio.get_running_loop()

    calls = CallLoop()
    together = [calls.start(loop_of()) for _ in range(5)]
    assert len(threads_of_calls()) == 1
    first = {id(call.result(10)) for call in together}
    assert len(first) == 1
    calls.settle()
    assert not threads_of_calls()
    loop = together[0].result()
    assert loop.is_closed()
    assert calls.run(loop_of()) is not loop


def test_the_next_loop_begins_when_the_one_before_has_ended() -> None:
    """What an engine has left to do in a loop is done before it is used in another."""
    done: list[str] = []

    async def leave_work() -> None:
        async def rest() -> None:
            try:
                await asyncio.sleep(3600)
            finally:
                time.sleep(0.05)
                done.append("rest")

        tasks.append(asyncio.ensure_future(rest()))
        await asyncio.sleep(0)

    async def next_call() -> None:
        done.append("next")

    tasks: list[asyncio.Task[None]] = []
    calls = CallLoop()
    calls.start(leave_work()).result(10)
    calls.start(next_call()).result(10)
    assert done == ["rest", "next"]


def test_calls_from_many_threads() -> None:
    calls, seen = CallLoop(), []

    def work(value: int) -> None:
        for _ in range(50):
            seen.append(calls.run(value_of(value)) == value)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert seen == [True] * 400
    calls.settle()
    assert not threads_of_calls()


def test_a_thread_that_does_not_start_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    calls, work = CallLoop(), value_of(7)
    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            calls.start(work)
    work.close()
    settling = threading.Thread(target=calls.end_all, daemon=True)
    settling.start()
    settling.join(10)
    assert not settling.is_alive()
    assert calls.start(value_of(7)).result(10) == 7


def test_a_call_that_is_ended_has_run_its_last_lines() -> None:
    cleaned = threading.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0.02)
            cleaned.set()

    calls = CallLoop()
    call = calls.start(work())
    time.sleep(0.02)
    calls.end(call)
    assert cleaned.is_set()
    assert isinstance(call.exception(), asyncio.CancelledError)
    calls.end(call)
    # One that has not begun yet ends without having begun.
    calls.end(calls.start(work()))
    other = calls.start(value_of(7))
    calls.end_all()
    assert other.done()


def test_an_interrupted_call_holds_the_loop_until_it_has_ended(
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

    async def next_call() -> bool:
        return cleaned.is_set()

    def interrupted(_call: Any) -> None:
        time.sleep(0.05)
        raise KeyboardInterrupt

    calls = CallLoop()
    with monkeypatch.context() as patch:
        patch.setattr("concurrent.futures.Future.result", interrupted)
        patch.setattr("concurrent.futures.Future.exception", interrupted)
        with pytest.raises(KeyboardInterrupt):
            calls.run(work())
    assert not cleaned.is_set()
    after = calls.start(next_call())
    time.sleep(0.05)
    assert not after.done()
    go_on.set()
    assert after.result(10)


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
