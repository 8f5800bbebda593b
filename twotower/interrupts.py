"""Runs a coroutine to its end from plain code, so that Ctrl-C ends it within a pass.

In a script `asyncio.run` does that: it cancels the work and raises KeyboardInterrupt. Inside a
running event loop (a notebook, or plain code below `async def`) the work has a thread of its own,
which no signal reaches: the thread that waits takes the signal and cancels it there.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

T = TypeVar("T")
# Their handlers ask the loop that waits here to stop its task, which it cannot do before the end.
_ASK_THE_LOOP = ("asyncio", "ipykernel")


def run_to_end(work: Coroutine[Any, Any, T], lock: threading.Lock) -> T:
    """The result of `work`, which holds `lock` for as long as it runs, also if this call is
    interrupted. After an interrupt its `finally` clauses have run, or run within one pass."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        _acquire(lock, work)
        try:
            return asyncio.run(work)
        finally:
            lock.release()
    with _interruptible():
        return _Beside(work, lock).result()


def _acquire(lock: threading.Lock, work: Coroutine[Any, Any, Any]) -> None:
    """Waits for another thread's call; work that does not begin is closed."""
    try:
        lock.acquire()
    except BaseException:
        work.close()
        raise


class _Beside(Generic[T]):
    """A coroutine that runs in a thread of its own."""

    def __init__(self, work: Coroutine[Any, Any, T], lock: threading.Lock) -> None:
        self._work = work
        self._lock = lock
        self._ended = threading.Event()
        self._started = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[T] | None = None
        self._result: T | None = None
        self._error: BaseException | None = None

    def result(self) -> T:
        """Runs the work; an exception that comes meanwhile, such as Ctrl-C, ends it first."""
        _acquire(self._lock, self._work)
        threading.Thread(target=self._run, name="twotower-call").start()
        try:
            self._ended.wait()
        except BaseException:
            self._cancel()
            self._ended.wait()
            raise
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]  # without an error there is one

    def _run(self) -> None:
        try:
            self._result = asyncio.run(self._kept())
        except BaseException as error:
            self._error = error
        finally:
            self._lock.release()
            self._ended.set()

    async def _kept(self) -> T:
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.ensure_future(self._work)
        self._started.set()
        return await self._task

    def _cancel(self) -> None:
        self._started.wait()
        assert self._loop is not None
        assert self._task is not None
        try:
            self._loop.call_soon_threadsafe(self._task.cancel)
        except RuntimeError:
            # The loop has closed: the work has just ended.
            return


@contextmanager
def _interruptible() -> Iterator[None]:
    """Lets Ctrl-C raise KeyboardInterrupt here, where the handler of an event loop would wait for
    this very call to end. A handler of the program's own stays."""
    handler = signal.getsignal(signal.SIGINT)
    owner = getattr(getattr(handler, "func", handler), "__module__", None) or ""
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or owner.partition(".")[0] not in _ASK_THE_LOOP:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
