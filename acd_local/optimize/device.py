"""Finds where torch can compute, and the dtype that is faster there."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
import time
from typing import Any

from acd_local.errors import UsageError

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "gguf")

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h
_SIZE, _ROWS, _ROUNDS = 1024, 256, 5  # of the products that are timed


def check_packages() -> None:
    """Raise UsageError where the extra `optimize` is not installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"acd optimize needs {', '.join(missing)}: run `pip install 'acd-local[optimize]'`")


def resolve(device: str) -> str:
    """Return torch's name of the device; "auto" takes an accelerator where there is one.

    Raises:
        UsageError: this torch has none of that kind.
    """
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(name for name, usable in there.items() if usable)
    if not there[device]:
        raise UsageError(f"--device {device}: torch {torch.__version__} finds none here: use cpu, or another torch")
    return device


def dtypes_by_speed(device: str) -> tuple[str, ...]:
    """List float32 and bfloat16, the faster one in matrix products first."""
    import torch

    def seconds(dtype: Any) -> float:
        a = torch.ones(_ROWS, _SIZE, dtype=dtype, device=device)
        b = torch.ones(_SIZE, _SIZE, dtype=dtype, device=device)
        best = float("inf")
        for _ in range(_ROUNDS):
            started = time.perf_counter()
            float((a @ b)[0, 0])  # waits for the device
            best = min(best, time.perf_counter() - started)
        return best

    return tuple(sorted(("float32", "bfloat16"), key=lambda name: seconds(getattr(torch, name))))


def free_memory(device: str) -> float | None:
    """Count the bytes that are free on an accelerator of its own memory; None: training takes the host's."""
    import torch

    return float(torch.cuda.mem_get_info()[0]) if device == "cuda" else None


def empty_cache() -> None:
    """Give what torch keeps of CUDA's memory back, for llama.cpp or for smaller batches."""
    import gc

    import torch

    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next step, instead of giving pages back and clearing new ones.

    On 2 cores a training step took a tenth less time. Elsewhere than on glibc this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter, value in ((_M_MMAP_THRESHOLD, 2**25), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**28)):
            mallopt(parameter, value)
