"""Children that load for us: what they import, and that they do not outlive us. And how many threads there are."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from acd_local.runtime import child, grammar
from acd_local.runtime.threads import physical_cores


def test_modules_in_the_working_directory_are_not_imported(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("json.py", "numpy.py", "acd_local.py"):
        (tmp_path / name).write_text("raise SystemExit(77)")
    model = tiny("chatml")
    monkeypatch.chdir(tmp_path)
    grammar.check("root ::= [a-f]+", model)
    assert child.run_module("acd_local.runtime.probe", str(model)).returncode == 0


def test_text_arrives_on_stdin() -> None:
    done = child.run_module("json.tool", "--no-ensure-ascii", "--compact", text='{"a": "é"}')
    assert done.stdout.decode().strip() == '{"a":"é"}'


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a named pipe")
def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    """Opening the pipe blocks inside llama.cpp, as reading a huge file from a slow disk would."""
    pipe = tmp_path / "slow.gguf"
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "acd_local.runtime.probe", str(pipe)]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    running = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=env)
    with pytest.raises(subprocess.TimeoutExpired):
        running.wait(2)
    assert running.stdin is not None
    running.stdin.close()
    assert running.wait(10) == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs CPU affinity")
def test_threads_are_the_cores_this_process_may_use() -> None:
    allowed = os.sched_getaffinity(0)
    assert 1 <= physical_cores() <= len(allowed)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert physical_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
