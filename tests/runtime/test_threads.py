"""How many threads llama.cpp gets where nobody says so, and how they wait for each other."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from manual import DEFAULT
from places import child_env

from acd_local import Engine, UsageError
from acd_local.evaluate.judge import Judge
from acd_local.runtime import threads
from acd_local.runtime.threads import default_threads, physical_cores


def test_the_environment_gives_the_default(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACD_THREADS", " 3 ")
    assert default_threads() == 3
    with Engine(tiny("chatml"), pair=DEFAULT, ctx_size=256) as engine:
        assert engine.threads == 3
    with Engine(tiny("chatml"), pair=DEFAULT, ctx_size=256, threads=1) as engine:
        assert engine.threads == 1
    for nothing in ("", " "):
        monkeypatch.setenv("ACD_THREADS", nothing)
        assert default_threads() == physical_cores()
    monkeypatch.delenv("ACD_THREADS")
    assert default_threads() == physical_cores()


@pytest.mark.parametrize(
    "value", ["0", "513", "-1", "2.5", "all", "\N{SUPERSCRIPT TWO}", "9" * 5000], ids=lambda v: v[:8]
)
def test_a_bad_number_is_one_line(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("ACD_THREADS", value)
    for use in (
        default_threads,
        lambda: Engine(tiny("chatml"), pair=DEFAULT, ctx_size=256),
        lambda: Judge(tiny("chatml")),
    ):
        with pytest.raises(UsageError, match=r"^ACD_THREADS must be a whole number from 1 to 512, not '") as failure:
            use()
        assert len(str(failure.value)) < 200
    Engine(tiny("chatml"), pair=DEFAULT, ctx_size=256, threads=1).close()  # where a number is given, nobody looks at it


@pytest.mark.parametrize(
    "command", [["run", "Hi"], ["eval", "--out", "out"], ["bench"], ["optimize", "--out", "out.toml"]]
)
def test_every_command_reads_it(tiny: Callable[..., Path], tmp_path: Path, command: list[str]) -> None:
    name, *rest = command
    module, before = ("run", []) if name == "run" else ("main", [name])
    done = subprocess.run(
        [sys.executable, "-c", f"from acd_local.cli.{module} import main; main()", *before, tiny("chatml"), *rest],
        env=child_env(ACD_THREADS="many"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    program = "acd-run" if name == "run" else "acd"
    assert done.stderr == f"{program}: ACD_THREADS must be a whole number from 1 to 512, not 'many'\n"


# libgomp's own default is 300,000 turns, or none with OMP_WAIT_POLICY=passive.
@pytest.mark.parametrize(
    ("given", "turns"),
    [({}, str(threads._SPINS)), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "passive"}, "0")],
    ids=["default", "spins", "policy"],
)
def test_openmp_waits_shortly_unless_the_user_said_how(given: dict[str, str], turns: str) -> None:
    program = """
import os, subprocess, sys
before = dict(os.environ)
import acd_local.runtime.llama
assert dict(os.environ) == before
child = subprocess.run([sys.executable, "-c", "import os; print('GOMP_SPINCOUNT' in os.environ)"], capture_output=True)
print(child.stdout.decode().strip())
"""
    kept = {k: v for k, v in child_env().items() if not k.startswith(("GOMP_", "OMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=kept | {"OMP_DISPLAY_ENV": "verbose"} | given,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str("GOMP_SPINCOUNT" in given)
    said = re.search(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    if said is None:
        pytest.skip("this llama.cpp does not use GNU's OpenMP")
    assert said[1] == turns
