"""Running one of this package's modules in a child process, where an abort of llama.cpp does no harm."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def can_start() -> bool:
    """Whether there is an interpreter to start a child with; a frozen application has none."""
    return bool(sys.executable) and not getattr(sys, "frozen", False)


def run_module(
    module: str, *args: str, text: str | None = None, timeout: float | None = None
) -> subprocess.CompletedProcess[bytes]:
    """`python -m module args`, importing from where this process does; stdout and stderr are captured.

    Args:
        text: what the child reads on stdin. None: a pipe that ends when this process does, for a child to watch.
        timeout: seconds; the child is killed when they are over.

    Raises:
        subprocess.TimeoutExpired, OSError.
    """
    root = str(Path(__file__).resolve().parents[2])
    env = os.environ | {
        "GGML_NO_BACKTRACE": "1",  # ggml's own backtrace can hang
        "PYTHONPATH": os.pathsep.join([root, *filter(None, sys.path)]),
        "PYTHONIOENCODING": "utf-8",
    }
    env.pop("PYTHONFAULTHANDLER", None)
    watched, held = os.pipe()
    try:
        return subprocess.run(
            [sys.executable, "-P", "-m", module, *args],  # -P keeps the working directory out of the imports
            env=env,
            capture_output=True,
            timeout=timeout,
            check=False,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
            stdin=watched if text is None else None,
            input=None if text is None else text.encode(),
        )
    finally:
        os.close(watched)
        os.close(held)
