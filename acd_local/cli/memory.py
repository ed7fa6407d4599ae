"""Lets a process that lives for long give memory back to the system."""

from __future__ import annotations

import contextlib
import ctypes
import sys

LARGE = 4 << 20  # bytes: more than an array of a large vocabulary, less than the state of a long prompt
ARENAS = 2  # heaps: the main thread's, and one more for all others
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h


def keep_heaps_small() -> None:
    """Keep what is freed from staying in the heaps of C's library.

    By itself glibc keeps blocks of up to 32 MB in the heap of the thread that asked for them, once such a block has
    been freed (`mallopt(3)`, M_MMAP_THRESHOLD): each long line, body or saved state may leave a hole of its size there.
    Blocks of `LARGE` bytes and more go back at once instead. Threads share `ARENAS` heaps (M_ARENA_MAX): of their own,
    each would come to hold what its thread once needed.

    Does nothing where the C library is another one.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_ARENA_MAX, ARENAS)
        libc.mallopt(_M_MMAP_THRESHOLD, LARGE)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * LARGE)  # as it would be in proportion: not at every token's end
