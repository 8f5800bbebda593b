"""Shows how far a job is from a thread, while the pipeline has the main one.

Not the other way round: Ctrl-C reaches the main thread, where Ray Data ends its pipeline in order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

POLL_S = 0.5


@contextmanager
def watched(look: Callable[[], None]) -> Iterator[None]:
    """Calls `look` twice a second while the block runs; it must not raise."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(POLL_S):
            look()

    thread = threading.Thread(target=run, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
