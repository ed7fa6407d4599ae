"""The memory that an optimization takes: estimated before, and where it runs out after all."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from optimize_runs import Asked, optimize

from acd_local import pairs
from acd_local.errors import OutOfMemoryError
from acd_local.optimize.prompt_tokens import Layout
from acd_local.optimize.soft_training import SoftSettings, SoftTraining
from acd_local.optimize.weights import Example, FrozenModel
from acd_local.progress import Stopped
from acd_local.runtime.gguf_header import read_header
from acd_local.tuning import memory
from acd_local.tuning.memory import Lengths, Sizes

pytestmark = pytest.mark.usefixtures("no_figures")  # those of pages: see test_report


def test_memory_pressure_does_not_change_how_many_anchors_are_answered_at_once(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = asked(soft_only=True)
    with pytest.raises(Stopped):
        optimize(request, ("anchors", 10))
    monkeypatch.setattr(memory, "conversations", lambda *args, **given: 1)
    optimize(request)
    assert pairs.load(request.out).provenance["conversations"] == 32


def test_a_batch_that_does_not_fit_after_all_is_halved(
    asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    whole = SoftTraining.step

    def step(self: SoftTraining) -> dict[Any, float]:
        if self.settings.micro > limit:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return whole(self)

    monkeypatch.setattr(SoftTraining, "step", step)
    request = asked(soft_only=True)
    limit = 0
    with pytest.raises(OutOfMemoryError, match="training step"):
        optimize(request)
    limit = 4
    optimize(request)
    (kept,) = tmp_path.glob("cache/optimize/*/soft-safe-*.pt")
    assert torch.load(kept, weights_only=True)["counts"] == {"steps": 12, "micro": 4}


def test_other_errors_that_speak_of_memory_are_told_as_they_are(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:

    def step(self: SoftTraining) -> dict[Any, float]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(SoftTraining, "step", step)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        optimize(asked(soft_only=True))


def test_memory_that_runs_out_later_halves_the_batch_and_goes_on(
    asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    whole = SoftTraining.step
    steps: list[tuple[int, int]] = []

    def step(self: SoftTraining) -> dict[Any, float]:
        if self.step_number >= 11 and self.settings.micro > limit:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        steps.append((self.step_number, self.settings.micro))
        return whole(self)

    monkeypatch.setattr(SoftTraining, "step", step)
    request = asked(soft_only=True)
    limit = 0
    with pytest.raises(OutOfMemoryError, match="training step"):
        optimize(request)
    steps.clear()
    limit = 4
    watcher = optimize(request)
    assert sum("going on with" in line for line in watcher.lines) == 2  # 16, 8, 4; the other prompt begins with 4
    assert steps[0] == (10, 16), "from the last checkpoint"
    assert {micro for number, micro in steps if number == 11} == {4}
    (kept,) = tmp_path.glob("cache/optimize/*/soft-safe-*.pt")
    found = torch.load(kept, weights_only=True)
    assert found["counts"] == {"steps": 12, "micro": 4}
    assert [row["step"] for row in found["result"]["history"]] == list(range(1, 13))


def test_a_resumed_training_keeps_to_the_memory_there_is_now(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:

    request = asked(soft_only=True)
    with pytest.raises(Stopped):
        optimize(request, ("soft safeguarding prompt", 5))
    choose, step, sizes = memory.choose, SoftTraining.step, set()

    def counted(self: SoftTraining) -> dict[Any, float]:
        sizes.add(self.settings.micro)
        return step(self)

    monkeypatch.setattr(memory, "choose", lambda *args, **given: replace(choose(*args, **given), micro=2))
    monkeypatch.setattr(SoftTraining, "step", counted)
    optimize(request)
    assert sizes == {2}


BIG = Sizes(4_400_000_000, 7_000_000_000, 131_000_000, 58_000, 4096, 8192, 32, 32_000)


LENGTHS = Lengths(150, 80, 16)


def test_the_first_dtype_and_the_largest_batch_that_fit_are_chosen() -> None:
    assert memory.choose(BIG, LENGTHS, ["float32", "bfloat16"], host=200e9, device=None).micro == 16
    tight = memory.choose(BIG, LENGTHS, ["float32", "bfloat16"], host=37e9, device=None)
    assert tight.dtype == "float32"
    assert tight.micro < 16
    assert memory.choose(BIG, LENGTHS, ["float32", "bfloat16"], host=25e9, device=None).dtype == "bfloat16"
    on_device = memory.choose(BIG, LENGTHS, ["bfloat16"], host=25e9, device=80e9)
    assert on_device.micro == 16


@pytest.mark.parametrize(
    ("dtypes", "host", "device", "says"),
    [
        (["float32"], 25e9, None, "--dtype bfloat16 takes about"),
        (["float32"], 8e9, None, "nothing smaller would fit"),
        (["float32", "bfloat16"], 8e9, None, "in bfloat16 take about"),
        (["bfloat16", "float32"], 8e9, None, "in bfloat16 take about"),
        (["float32"], 200e9, 24e9, "not enough memory on the device"),
        (["bfloat16"], 8e9, 80e9, "loading the weights in bfloat16"),
    ],
)
def test_too_little_memory_says_what_would_fit(dtypes: list[str], host: float, device: float | None, says: str) -> None:
    with pytest.raises(OutOfMemoryError, match=says) as caught:
        memory.choose(BIG, LENGTHS, dtypes, host=host, device=device)
    assert "\n" not in str(caught.value)


def test_memory_is_refused_before_anything_is_computed(
    asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available", lambda: 1e6)
    with pytest.raises(OutOfMemoryError, match="are free"):
        optimize(asked())
    assert not list(tmp_path.glob("cache/optimize/*/*.pt"))
    assert not list(tmp_path.glob("cache/optimize/*/*.jsonl"))


def test_sizes_are_the_headers(tiny: Callable[..., Path]) -> None:
    size = memory.sizes(read_header(tiny("chatml")))
    embedding = size.n_vocab * 64
    layer = 64 * (64 + 32 + 32 + 64 + 128 + 128 + 128) + 2 * 64
    assert size.parameters == 2 * embedding + 2 * layer + 64
    assert (size.largest, size.attention, size.keys, size.n_layers) == (embedding, 64, 64, 2)
    assert memory.conversations(size, 512, 1e12, (32, 8, 1)) == 32
    assert memory.conversations(size, 512, 3 * 8 * 2 * 512 * 2 * 64 * 2, (32, 8, 1)) == 8
    assert memory.conversations(size, 512, 0, (32, 8, 1)) == 1
    eight = 3 * 8 * 2 * 512 * 2 * 64 * 2
    for host, device in ((1e12, size.file + eight), (eight, 1e12)):  # the file goes to the device too
        assert memory.conversations(size, 512, host, (32, 8, 1), device=device) == 8
    assert memory.conversations(size, 512, 1e12, (32, 8, 1), device=eight) == 1
    assert memory.conversations(size, 512, 1e12, (32, 8, 1), device=0) == 1


PEAKS = """
from acd_local.tuning import memory
for size in (200_000_000, 1_000_000):
    memory.reset_peak()
    block = bytearray(size)
    block[::4096] = b"x" * len(block[::4096])
    print(memory.peak()["peak"])
    del block
"""


def test_peaks_count_from_the_last_reset() -> None:
    # In a process of its own: others may keep what they freed.
    printed = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True).stdout
    large, small = map(float, printed.split())
    assert large >= 200e6
    if Path("/proc/self/clear_refs").exists():
        assert large - small > 100e6
    assert memory.available() > 1e6


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "micro"), [("float32", 16), ("float32", 4), ("bfloat16", 16)])
def test_the_estimate_is_near_what_training_takes(demo: Path, dtype: str, micro: int) -> None:

    lengths = Lengths(110, 76, 16)
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # else what the case before had would serve this one
    memory.reset_peak()
    base = memory.peak()["peak"]
    model = FrozenModel(demo, dtype=getattr(torch, dtype))
    loading = memory.peak()["peak"] - base
    ids = list(range(300, 5000))
    examples = [Example(tuple(ids[i : i + 60]), tuple(ids[i + 60 : i + 76])) for i in range(0, 80 * micro, 80)]
    layout = Layout(tuple(ids[:20]), tuple(ids[20:30]))
    settings = SoftSettings(micro=micro, sizes={"positive": micro})
    memory.reset_peak()
    SoftTraining(model, layout, model.embed(ids[30:110]), {"positive": examples}, settings, 0).step()
    needs = memory.estimate(memory.sizes(read_header(demo)), lengths, dtype, micro)
    assert 0.8 * loading < needs.host < 2.0 * loading
    assert 0.9 < needs.training / (memory.peak()["peak"] - base) < 1.7


def test_a_system_that_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows has neither /proc nor sysconf nor the module resource."""

    def refuse(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", refuse)
    monkeypatch.delattr("os.sysconf")
    assert 1e9 < memory.available() <= 8e9
    monkeypatch.setitem(sys.modules, "resource", None)
    assert memory.peak()["peak"] == 0.0
