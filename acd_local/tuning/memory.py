"""Estimates how much memory an optimization takes before it starts, and measures how much it took.

The estimate follows what the parts are: weights, what transformers holds while it loads them, what the backward pass
keeps of each token, logits. Its factors were measured (tests/tuning/test_memory.py compares again).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path

from acd_local.errors import OutOfMemoryError
from acd_local.runtime import gguf_header
from acd_local.runtime.gguf_header import GGUFInfo

BYTES = {"float32": 4, "bfloat16": 2}
MICRO = (16, 8, 4, 2, 1)  # examples that go through the model together

_LOADING = 2.5  # copies of the largest tensor while it is dequantized, in float32
_KEPT = 2.2  # numbers kept for the backward pass, per output of a layer's matrices
_LOGITS = 4  # copies of the logits, gradients among them, in float32
_HEAD = 64  # numbers of an attention head, where files do not say
_SLACK = 150e6  # what torch and the interpreter need besides
_UNKNOWN = 4e9  # bytes that are there where the system does not tell


@dataclass(frozen=True)
class Sizes:
    """A model's sizes that decide about memory, all in numbers but `file`, in bytes.

    Attributes:
        parameters: of the whole model.
        largest: of the largest tensor.
        outputs: per token, of a layer's matrices together.
        attention: per token, of a layer's queries.
        keys: per token, of a layer's keys and values.
    """

    file: int
    parameters: int
    largest: int
    outputs: int
    attention: int
    keys: int
    n_layers: int
    n_vocab: int


@dataclass(frozen=True)
class Lengths:
    """Tokens of the longest conversation: shared prefix, what follows it, and the answer's part of that."""

    prefix: int
    own: int
    answer: int


@dataclass(frozen=True)
class Needs:
    """Bytes for a dtype and so many examples per micro-batch: of the weights while they are loaded (`host`), and of all
    while a prompt is trained (`training`)."""

    dtype: str
    micro: int
    host: float
    training: float


def sizes(info: GGUFInfo) -> Sizes:
    """Read the sizes off the tensors that the file's header lists."""
    shapes = {name: shape for part in info.parts for name, shape in gguf_header.tensor_shapes(part).items()}
    counts = [prod(shape) for shape in shapes.values()]
    layer = [shape for name, shape in shapes.items() if name.startswith("blk.0.") and len(shape) > 1]
    queries = [s[1] for name, s in shapes.items() if name in ("blk.0.attn_q.weight", "blk.0.attn_qkv.weight")]
    keys = [s[1] for name, s in shapes.items() if name in ("blk.0.attn_k.weight", "blk.0.attn_v.weight")]
    return Sizes(
        file=info.size,
        parameters=sum(counts),
        largest=max(counts),
        outputs=sum(prod(shape[1:]) for shape in layer),
        attention=max([*queries, info.n_embd]),
        keys=sum(keys) or 2 * info.n_embd,
        n_layers=info.n_layers,
        n_vocab=info.n_vocab,
    )


def estimate(size: Sizes, lengths: Lengths, dtype: str, micro: int) -> Needs:
    """Estimate what a training step takes, for the longest conversations."""
    width, sequence = BYTES[dtype], lengths.prefix + lengths.own
    weights = size.parameters * width
    tokens = micro * lengths.own + lengths.prefix
    kept = size.n_layers * tokens * size.outputs * _KEPT * width
    keys = size.n_layers * micro * sequence * size.attention * 2 * width
    scores = size.n_layers * micro * lengths.own * sequence * (size.attention / _HEAD) * (width + 4)
    logits = micro * lengths.answer * size.n_vocab * 4 * _LOGITS
    loading = weights + size.file + _LOADING * 4 * size.largest
    # The file stays mapped while the quantized model is scored beside the weights.
    training = weights + size.file + kept + keys + scores + logits
    return Needs(dtype, micro, loading + _SLACK, training + _SLACK)


def choose(
    size: Sizes, lengths: Lengths, dtypes: Sequence[str], *, host: float, device: float | None, most: int = MICRO[0]
) -> Needs:
    """Choose the first dtype that fits, with the largest micro-batch that does.

    Args:
        dtypes: by preference.
        host: bytes of memory that are free.
        device: bytes that are free on the accelerator; None: training takes the host's.
        most: the largest micro-batch wanted.

    Raises:
        OutOfMemoryError: none fits; says what is needed, and what would fit.
    """
    for dtype in dtypes:
        for micro in (m for m in MICRO if m <= most):
            needs = estimate(size, lengths, dtype, micro)
            if needs.host <= host and needs.training <= (host if device is None else device):
                return needs
    raise OutOfMemoryError(_refusal(size, lengths, dtypes, host, device))


def conversations(
    size: Sizes, context: int, host: float, options: Sequence[int], *, device: float | None = None
) -> int:
    """Choose the most of `options` conversations whose KV cache (f16) takes a third of the free memory at most.

    Each has two streams of `context` tokens. Where none fits, it is the last option.

    Args:
        device: bytes that are free on the accelerator, where the file's weights and the caches go; None: on the host.
    """
    each = 2 * context * size.n_layers * size.keys * 2
    free = host if device is None else min(host, device - size.file)
    return next((n for n in options if n * each <= free / 3), options[-1])


def _refusal(size: Sizes, lengths: Lengths, dtypes: Sequence[str], host: float, device: float | None) -> str:
    def need(dtype: str) -> float:
        needs = estimate(size, lengths, dtype, 1)
        return max(needs.host, needs.training) if device is None else needs.training

    free = host if device is None else device
    least = min(dtypes, key=BYTES.__getitem__)
    if device is not None and estimate(size, lengths, least, 1).host > host:
        loading = estimate(size, lengths, least, 1).host
        return f"loading the weights in {least} takes about {gb(loading)}, {gb(host)} are free: free some memory"
    where = "" if device is None else " on the device"
    text = f"not enough memory{where}: {size.parameters / 1e6:,.0f} million parameters in {least} take about "
    text += f"{gb(need(least))} with one example at a time, {gb(free)} are free"
    if least != "bfloat16" and need("bfloat16") <= free:
        return f"{text}; --dtype bfloat16 takes about {gb(need('bfloat16'))} and would fit"
    return f"{text}; nothing smaller would fit: use a machine with more memory, or a smaller model"


def gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


# --- What there is, and what was taken --------------------------------------------------------------------------------


def available() -> float:
    """Count the bytes that this process may still take, without swapping."""
    free = _meminfo("MemAvailable")
    if free is None:
        known = hasattr(os, "sysconf")  # not on Windows
        free = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) if known else _UNKNOWN
    return min(free, _container_left())


def _meminfo(key: str) -> float | None:
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return None
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


def _container_left() -> float:
    """Count what a cgroup (version 2) leaves; its file cache can be dropped."""
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = float((group / "memory.max").read_text()), float((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return limit - used + float(stat.get("inactive_file", 0)) + float(stat.get("active_file", 0))
    except (OSError, ValueError):  # no such group, or "max"
        return float("inf")


def reset_peak() -> None:
    """Count `peak` from here, where the system can do that (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak() -> dict[str, float]:
    """Return the most bytes since `reset_peak`: {"peak": of this process, "device_peak": of torch on CUDA, if any}."""
    found = {"peak": _resident_peak()}
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        found["device_peak"] = float(torch.cuda.max_memory_allocated())
    return found


def _resident_peak() -> float:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        try:
            import resource
        except ImportError:  # on Windows
            return 0.0
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return float(most if sys.platform == "darwin" else most * 1024)
