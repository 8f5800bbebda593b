"""Keeps freed memory in the process: new pages cost a training step up to a third of its time."""

from __future__ import annotations

import ctypes

import torch

# Names and numbers from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_NEVER_TRIM = 2**31 - 1


def keep_pages(touch_bytes: int) -> bool:
    """Sets glibc to keep freed memory in its heap, and writes to `touch_bytes` of memory once, so
    that these pages exist. True if glibc took the settings, False also on another libc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = (
        (_M_MMAP_MAX, 0),
        (_M_TRIM_THRESHOLD, _NEVER_TRIM),
        (_M_TOP_PAD, 64 * 1024 * 1024),
        (_M_ARENA_MAX, 1),
    )
    kept = all(mallopt(option, value) == 1 for option, value in settings)
    torch.ones(touch_bytes, dtype=torch.uint8)
    return kept
