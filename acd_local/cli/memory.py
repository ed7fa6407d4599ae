"""Lets a process that lives for long give memory back to the system."""

from __future__ import annotations

import contextlib
import ctypes
import sys

LARGE = 4 << 20  # bytes: more than an array of a large vocabulary, less than the state of a long prompt
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def give_back_large_blocks() -> None:
    """Let every block of `LARGE` bytes and more go back to the system as soon as it is freed.

    By itself glibc keeps blocks of up to 32 MB in the heap of the thread that asked for them, once such a block has
    been freed (`mallopt(3)`, M_MMAP_THRESHOLD): each long line, body or saved state may leave a hole of its size there.
    Does nothing where the C library is another one.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, LARGE)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * LARGE)  # as it would be in proportion: not at every token's end
