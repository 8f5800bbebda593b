"""An event loop in a thread of its own, on which plain code and other loops have work done.

An engine belongs to one event loop. All calls of a model run on the model's loop, whichever thread
or loop they come from, so that they share passes and none has to wait for another to end.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

T = TypeVar("T")
# Handlers of these ask the loop that waits here to stop its task: it cannot before the end.
_ASK_THE_LOOP = ("asyncio", "ipykernel")


class LoopThread:
    """Runs coroutines on its loop; the thread starts with the first of them.

    An interrupted or cancelled call cancels its work, and returns once the work has ended: its
    `finally` clauses have run. A second interrupt does not wait for that.
    """

    def __init__(self) -> None:
        self._starting = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, for plain code; raises what it raises, and KeyboardInterrupt."""
        begun = _Work(self._running_loop(), work)
        with _interruptible():
            try:
                return begun.future.result()
            except BaseException:
                if not begun.future.done():
                    begun.cancel()
                    wait([begun.future])
                raise

    async def await_(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, for a coroutine on another loop."""
        begun = _Work(self._running_loop(), work)
        ended = asyncio.wrap_future(begun.future)
        try:
            return await asyncio.shield(ended)
        except asyncio.CancelledError:
            if not begun.future.done():
                begun.cancel()
                await asyncio.wait([ended])
                # Looked at, so that nobody reports it as forgotten.
                ended.cancelled() or ended.exception()
            raise

    def start(self, work: Coroutine[Any, Any, Any]) -> None:
        """Has `work` done without waiting for it."""
        _Work(self._running_loop(), work)

    def close(self) -> None:
        """Cancels what still runs, within one pass, and ends the thread."""
        with self._starting:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is None or thread is None or not thread.is_alive():
            return
        loop.call_soon_threadsafe(loop.stop)
        if thread is not threading.current_thread():
            thread.join()

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        with self._starting:
            # After a fork the thread is not there any more.
            if self._loop is None or self._thread is None or not self._thread.is_alive():
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=_run, args=(self._loop,), name="twotower-loop", daemon=True
                )
                self._thread.start()
            return self._loop


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


class _Work(Generic[T]):
    """A coroutine as a task of another thread's loop; `future` has its result once it has ended."""

    def __init__(self, loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T]) -> None:
        self.future: Future[T] = Future()
        # Whoever waits cannot end it by cancelling the future: that is known once the task ends.
        self.future.set_running_or_notify_cancel()
        self._loop = loop
        self._task: asyncio.Task[T] | None = None
        loop.call_soon_threadsafe(self._begin, work)

    def cancel(self) -> None:
        """Cancels the task, which may take until the end of a pass."""
        self._loop.call_soon_threadsafe(self._cancel)

    def _begin(self, work: Coroutine[Any, Any, T]) -> None:
        self._task = self._loop.create_task(work)
        self._task.add_done_callback(self._end)

    def _cancel(self) -> None:
        # Begun before: both are called in order.
        assert self._task is not None
        self._task.cancel()

    def _end(self, task: asyncio.Task[T]) -> None:
        if task.cancelled():
            self.future.set_exception(asyncio.CancelledError())
        elif (error := task.exception()) is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(task.result())


@contextmanager
def _interruptible() -> Iterator[None]:
    """Lets Ctrl-C raise KeyboardInterrupt here, where the handler of an event loop would wait for
    this very call to end. A handler that the program has set itself stays."""
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
