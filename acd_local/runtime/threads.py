"""Says how many CPU threads to use, by default the physical cores, and how they wait; makes one with a large stack."""

from __future__ import annotations

import os
import platform
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from acd_local.errors import OutOfMemoryError, UsageError
from acd_local.options import ENGINE_RANGES

# How often a thread of GNU's OpenMP looks for the others before it sleeps: for some 10 microseconds. With its own
# 300,000 a thread that waits keeps the core from the one it waits for where other programs run; with 0 every node of a
# graph waits for the system's scheduler, which halves the speed where none do. Only x86 pauses between two looks.
_SPINS = 300 if platform.machine().lower() in ("x86_64", "amd64", "i686") else 10_000

T = TypeVar("T")
_stack_size = threading.Lock()  # it is the process's: held while it is changed


@contextmanager
def openmp_settings() -> Iterator[None]:
    """Set how threads wait for the llama.cpp that is loaded inside.

    GNU's OpenMP reads its settings from the environment as it is loaded, and never again.
    What the user has set stands, and the environment is as before afterwards.
    """
    name = "GOMP_SPINCOUNT"
    if name in os.environ or "OMP_WAIT_POLICY" in os.environ:
        yield
        return
    os.environ[name] = str(_SPINS)
    try:
        yield
    finally:
        del os.environ[name]


def default_threads() -> int:
    """Return the number of threads where nobody chose one: $ACD_THREADS, else the physical cores.

    Raises:
        UsageError: ACD_THREADS is no number of threads.
    """
    text = os.environ.get("ACD_THREADS", "").strip()
    if not text:
        return physical_cores()
    low, high = ENGINE_RANGES["threads"]
    if not (text.isascii() and text.isdigit() and len(text) < 10 and low <= int(text) <= high):
        raise UsageError(f"ACD_THREADS must be a whole number from {low} to {high}, not {text[:100]!r}")
    return int(text)


def physical_cores() -> int:
    """Count the physical cores available to this process, at least 1.

    A second hardware thread of a core slows ggml's matrix products down rather than up. On Apple silicon only the
    performance cores count, as in llama.cpp. Container CPU quotas (cgroup v2) are respected.
    """
    count = _darwin() if sys.platform == "darwin" else _linux() if sys.platform == "linux" else None
    return max(1, min(count or max(1, (os.cpu_count() or 2) // 2), _quota()))


def on_large_stack(size: int, function: Callable[..., T], *args: object) -> T:
    """Call a function on a stack of `size` bytes, however small the caller's is; returns when it has, come what may.

    Raises:
        OutOfMemoryError: there is no memory for the stack.
    """
    results: list[T] = []
    thread = threading.Thread(target=lambda: results.append(function(*args)), daemon=True)
    with _stack_size:
        before = threading.stack_size(size)
        try:
            thread.start()
        except RuntimeError as error:
            raise OutOfMemoryError(f"not enough memory for a stack of {size >> 20} MB: {error}") from None
        finally:
            threading.stack_size(before)
    interrupted: BaseException | None = None
    while thread.is_alive():  # the caller's memory is in use
        try:
            thread.join()
        except BaseException as error:
            interrupted = error
    if interrupted is not None:
        raise interrupted
    return results[0]


def _linux() -> int | None:
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text().strip())
        except OSError:
            cores.add(str(cpu))
    return len(cores)


def _darwin() -> int | None:
    import subprocess  # slow to import

    for name in ("hw.perflevel0.physicalcpu", "hw.physicalcpu"):
        done = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip().isdigit():
            return int(done.stdout)
    return None


def _quota() -> int:
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, round(int(quota) / int(period)))
    except (OSError, ValueError):
        return 2**31
