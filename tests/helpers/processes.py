"""Looks at processes that tests start, and ends them."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path


def is_running(process: int) -> bool:
    """Whether there is such a process, other than one that has ended and that nobody asked about."""
    try:
        os.kill(process, 0)
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except FileNotFoundError:
        return sys.platform != "linux"


def resident_mb(process: int) -> float:
    """The memory of a process that is not on the disk, 10^6 bytes."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024 / 1e6


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a process at once, and close its pipes."""
    process.kill()
    process.wait(30)
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with suppress(OSError):
                stream.close()
