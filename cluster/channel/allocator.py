"""Settings of the C library's allocator for the frames of updates."""

from __future__ import annotations

import ctypes
import functools

# mallopt(3): blocks above MAPPED_BYTES come from the system each time, free memory above KEPT_BYTES
# goes back to it.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
MAPPED_BYTES = 32 << 20
KEPT_BYTES = 128 << 20


@functools.cache
def keep_freed_memory() -> None:
    """Lets glibc keep up to KEPT_BYTES of freed memory for the process's next allocations.

    By default an update's frames go back to the system once it is applied, and the next one's
    pages are mapped and cleared anew, which costs more than sending the bytes. Under another C
    library this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, MAPPED_BYTES)
        mallopt(_TRIM_THRESHOLD, KEPT_BYTES)
