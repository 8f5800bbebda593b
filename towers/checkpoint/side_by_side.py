"""Threads that read and pack matrices side by side, each of them alone.

One operator shared by all of torch's threads is the slower way: matrices of a megabyte take less
than a millisecond, and beside other programs every operator waits for the thread that the system
has set aside. So each thread takes whole layers, and its operators no other threads.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

# More would wait for memory and disk, and each holds a buffer and a part of a file.
_MOST_THREADS = 16
# torch has one number for threads that begin, which is another one while a pool begins.
_beginning = threading.Lock()


@contextmanager
def threads_side_by_side() -> Iterator[ThreadPoolExecutor]:
    """As many threads as an operator of the calling thread takes, up to 16, in which operators take
    one.

    Work that has not begun when the block is left is dropped.
    """
    pool = _begun(min(_MOST_THREADS, torch.get_num_threads()))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _begun(count: int) -> ThreadPoolExecutor:
    """A pool whose threads have all begun, each with its number of torch's threads set to 1."""
    together = threading.Barrier(count + 1)
    pool = ThreadPoolExecutor(count, "load", initializer=_alone)
    with _beginning:
        before = torch.get_num_threads()
        try:
            for _ in range(count):
                pool.submit(together.wait)
            together.wait()
        except BaseException:
            # Those that have begun would wait for the others for ever.
            together.abort()
            pool.shutdown()
            raise
        finally:
            # The setting of a thread that has begun stays its own; this one is for later threads.
            torch.set_num_threads(before)
    return pool


def _alone() -> None:
    """Lets operators of this thread take no other."""
    # Asked first: a thread takes the common number when it is asked or computes for the first time.
    torch.get_num_threads()
    torch.set_num_threads(1)
