"""How many CPU threads to use: the physical cores this process may run on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def physical_cores() -> int:
    """Physical cores available to this process, at least 1.

    A second hardware thread of a core slows ggml's matrix products down rather than up. On Apple silicon only the
    performance cores count, as in llama.cpp. Container CPU quotas (cgroup v2) are respected.
    """
    count = _darwin() if sys.platform == "darwin" else _linux() if sys.platform == "linux" else None
    return max(1, min(count or max(1, (os.cpu_count() or 2) // 2), _quota()))


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
