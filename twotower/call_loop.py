"""The event loop of a model's calls: all that are in flight share its passes.

An engine belongs to one event loop at a time. A thread runs that of a model from the first call to
the end of the last, so that calls may come from scripts, from several threads and from inside
running event loops (a notebook, or below `async def`), and overlap in any way. Waiting for a call
happens in the caller's thread, where Ctrl-C is raised: it ends the call within one pass.
"""

from __future__ import annotations

import asyncio
import atexit
import signal
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar
from weakref import WeakSet

T = TypeVar("T")
# Their handlers ask the loop that waits here to stop its task, which it cannot do before the end.
_ASK_THE_LOOP = ("asyncio", "ipykernel")


class CallLoop:
    """Runs coroutines in one event loop, which has a thread for as long as any of them runs."""

    def __init__(self) -> None:
        # Re-entrant: a stream that the garbage collector drops is cancelled from anywhere.
        self._lock = threading.RLock()
        # Calls in flight; without a task until the loop has begun it.
        self._calls: dict[Future[Any], asyncio.Task[Any] | None] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._ended = threading.Event()
        self._ended.set()
        _ALL.add(self)

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Begins a call. Its future ends when the work has, also after `cancel`."""
        call: Future[T] = Future()
        call.set_running_or_notify_cancel()
        with self._lock:
            if not self._calls:
                self._begin()
            assert self._loop is not None
            self._calls[call] = None
            self._loop.call_soon_threadsafe(self._launch, call, work)
        return call

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a call. An exception that comes meanwhile, such as Ctrl-C, ends the call
        first; a second one leaves it to end by itself."""
        with interruptible():
            call = self.start(work)
            try:
                return call.result()
            except BaseException:
                self.end(call)
                raise
            finally:
                self.settle()

    def cancel(self, call: Future[Any]) -> None:
        """Asks a call to end; its future then raises CancelledError. From any thread."""
        with self._lock:
            if call in self._calls and self._loop is not None:
                self._loop.call_soon_threadsafe(self._cancel_task, call)

    def end(self, call: Future[Any]) -> None:
        """Cancels a call and waits until its `finally` clauses have run."""
        self.cancel(call)
        call.exception()

    def settle(self) -> None:
        """Waits for the loop's end if no call is in flight: the engines are then free for other
        event loops."""
        with self._lock:
            ended = None if self._calls else self._ended
        if ended is not None:
            ended.wait()

    def end_all(self) -> None:
        """Ends every call: at the program's end, where a thread inside a pass cannot stay."""
        with self._lock:
            calls = list(self._calls)
        for call in calls:
            self.cancel(call)
        for call in calls:
            call.exception()
        self.settle()

    def _begin(self) -> None:
        """Starts a loop; it waits until the one before it has closed."""
        loop, stop, ended = asyncio.new_event_loop(), asyncio.Event(), threading.Event()
        work = partial(_run, loop, stop, self._ended, ended)
        try:
            threading.Thread(target=work, name="twotower-calls", daemon=True).start()
        except RuntimeError:
            # The system has no more threads: nothing may wait for the end of this loop.
            loop.close()
            raise
        self._loop, self._stop, self._ended = loop, stop, ended

    def _launch(self, call: Future[T], work: Coroutine[Any, Any, T]) -> None:
        task = self._calls[call] = asyncio.ensure_future(work)
        task.add_done_callback(partial(self._finish, call))

    def _cancel_task(self, call: Future[Any]) -> None:
        task = self._calls.get(call)
        if task is not None:
            task.cancel()

    def _finish(self, call: Future[T], task: asyncio.Task[T]) -> None:
        with self._lock:
            del self._calls[call]
            if not self._calls:
                self._stop.set()
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is None:
            call.set_result(task.result())
        else:
            call.set_exception(error)


_ALL: WeakSet[CallLoop] = WeakSet()


@atexit.register
def _end_calls() -> None:
    for calls in list(_ALL):
        calls.end_all()


def _run(
    loop: asyncio.AbstractEventLoop,
    stop: asyncio.Event,
    before: threading.Event,
    ended: threading.Event,
) -> None:
    """Runs a loop until `stop` is set in it, once the loop `before` it has ended."""
    before.wait()
    try:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(stop.wait())
    finally:
        ended.set()


@contextmanager
def interruptible() -> Iterator[None]:
    """Lets Ctrl-C raise KeyboardInterrupt here, where the handler of an event loop would wait for
    this very call to end. A handler that the program has set stays."""
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
