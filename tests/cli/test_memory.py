"""acd_local.cli.memory: what a process that lives for long does to the C library's heaps."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# Threads that each hold blocks of C's heap at the same time, and one that takes and frees a large one.
PROGRAM = """
import ctypes, json, sys, threading, tempfile
from acd_local.cli import memory
if sys.argv[1] == "as asked":
    memory.keep_heaps_small()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
libc.fopen.restype, libc.malloc_info.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
libc.fclose.argtypes = [ctypes.c_void_p]
together = threading.Barrier(8)

def hold():
    block = libc.malloc(50_000)
    together.wait()
    libc.free(block)

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

threads = [threading.Thread(target=hold) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
before = resident()
for size in (16 << 20, 8 << 20):  # by itself glibc takes the second from the heap, since the first was freed
    block = libc.malloc(size)
    small = libc.malloc(100)  # behind it
    ctypes.memset(block, 1, size)
    libc.free(block)
with tempfile.NamedTemporaryFile() as file:
    out = libc.fopen(file.name.encode(), b"w")
    libc.malloc_info(0, out)
    libc.fclose(out)
    heaps = file.read().count(b"<heap nr=")
print(json.dumps([heaps, resident() - before]))
"""


def figures(how: str) -> tuple[int, int]:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    heaps, left = json.loads(done.stdout)
    return heaps, left


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_threads_share_heaps_and_large_blocks_go_back() -> None:
    if (by_itself := figures("by itself"))[0] <= 2:
        pytest.skip("another C library, or one that was told of its heaps by the environment")
    heaps, left = figures("as asked")
    assert heaps == 2 < by_itself[0]
    assert left < 4 << 20 < by_itself[1]
