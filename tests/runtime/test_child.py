"""Children that load for us: what they import, that they do not outlive us, and that none is somebody's application.

And how many threads there are.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from places import child_env

from acd_local.errors import InternalError
from acd_local.runtime import child, grammar, probe
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
    env = child_env()
    running = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=env)
    with pytest.raises(subprocess.TimeoutExpired):
        running.wait(2)
    assert running.stdin is not None
    running.stdin.close()
    assert running.wait(10) == 1


# --- frozen applications ---

PYTHON = sys.executable
HOOK = Path(child.__file__).parents[1] / "__pyinstaller" / "rthooks" / "pyi_rth_acd_local.py"


@pytest.mark.parametrize(
    ("executable", "frozen", "announced", "starts"),
    [
        ("/usr/bin/python3.11", False, False, True),
        ("C:/app/pythonw.exe", False, False, True),
        ("/usr/bin/pypy3", False, False, True),
        ("/opt/app/app", True, True, True),
        ("/opt/app/app", True, False, False),  # cx_Freeze, or PyInstaller without our hook
        ("/opt/app/python", True, False, False),
        ("/opt/app/app.bin", False, False, False),  # Nuitka, or an application that embeds Python
        ("", False, False, False),
    ],
)
def test_where_children_can_be_started(
    executable: str, frozen: bool, announced: bool, starts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    monkeypatch.setattr(sys, "frozen", frozen, raising=False)
    monkeypatch.setattr(sys, child.ANNOUNCED, announced, raising=False)
    assert child.can_start() is starts
    if not starts:
        with pytest.raises(InternalError):
            child.run_module("json.tool")


def test_a_child_starts_none_itself() -> None:
    """Whatever was started by mistake ends there."""
    question = "import sys; from acd_local.runtime import child; sys.exit(child.can_start())"
    env = child._environment()
    assert subprocess.run([sys.executable, "-c", question], env=env, check=False).returncode == 0
    del env["ACD_LOCAL_CHILD"]
    assert subprocess.run([sys.executable, "-c", question], env=env, check=False).returncode == 1


@pytest.fixture
def application(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process is a frozen application whose program runs our hook, then its own code: its starts are in a log."""
    log, program = tmp_path / "starts", tmp_path / "application"
    code = f"import runpy, sys; runpy.run_path({str(HOOK)!r}); open({str(log)!r}, 'a').write('started\\n')"
    env = f"PYTHONPATH={shlex.quote(str(HOOK.parents[3]))}"
    program.write_text(f'#!/bin/sh\n{env} exec {shlex.quote(PYTHON)} -c {shlex.quote(code)} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, child.ANNOUNCED, True, raising=False)
    return log


@pytest.mark.skipif(sys.platform == "win32", reason="the program is a shell script")
def test_a_frozen_application_is_its_own_child(
    application: Path, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACD_CACHE_DIR", str(tmp_path / "cache"))
    done = child.run_module("acd_local.runtime.probe", str(tiny("chatml")))
    assert done.returncode == 0, done.stderr
    assert [list(json.loads(line)) for line in done.stdout.splitlines()] == [
        ["special", "chat_template"],
        ["row_seconds"],
    ]
    assert probe.verify(tiny("chatml"), force=True).n_layers == 2
    assert len(list(tmp_path.glob("cache/verified/*.json"))) == 1
    if "acd_local.runtime.grammar" in child.REENTERED:
        grammar.check("root ::= [a-f]{1,9}", tiny("chatml"))
    assert not application.exists(), "the application was started again"


@pytest.mark.skipif(sys.platform == "win32", reason="the program is a shell script")
def test_only_our_children_can_be_asked_for(application: Path, tmp_path: Path) -> None:
    for module in ("json.tool", "acd_local.cli.run", "acd_local.bench.memory", ""):
        done = child.run_module(module)
        assert done.returncode == 1 and done.stderr.decode().endswith(f"{module} is no child of acd_local\n")
    assert subprocess.run([sys.executable, child.REENTER], check=False, capture_output=True).returncode == 1
    assert not application.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="the program is a shell script")
def test_the_hook_lets_the_application_run_and_announces_itself(application: Path) -> None:
    subprocess.run([sys.executable, "its own", "arguments"], check=True)
    assert application.read_text() == "started\n"
    code = f"import runpy, sys; runpy.run_path({str(HOOK)!r}); sys.exit(not sys.{child.ANNOUNCED})"
    subprocess.run([PYTHON, "-c", code], check=True)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs CPU affinity")
def test_threads_are_the_cores_this_process_may_use() -> None:
    allowed = os.sched_getaffinity(0)
    assert 1 <= physical_cores() <= len(allowed)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert physical_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
