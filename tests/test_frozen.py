"""An application that PyInstaller freezes: our hook takes everything along, and new files are tried in children.

The application is built once, as a developer would: `pyinstaller application.py`, without any flag about acd_local.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny_gguf
from places import ROOT, child_env

import acd_local

HOOKS = ROOT / "acd_local" / "__pyinstaller"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("PyInstaller") is None, reason="PyInstaller is not installed"),
]

APPLICATION = """
import os, sys


def note(text):
    with open(os.environ["APPLICATION_LOG"], "a") as log:
        log.write(text + "\\n")


note("application")
sys.addaudithook(lambda event, args: note(f"child {args[1][2]}") if event == "subprocess.Popen" else None)

import acd_local

try:
    with acd_local.load(sys.argv[1], ctx_size=512, threads=1) as engine:
        answer = engine.chat().ask(sys.argv[2], max_tokens=12, temp=0.0, draft_max=0)
        print(engine.pair.name, answer.text, sep="\\n")
except acd_local.AcdError as error:
    print(type(error).__name__, error, sep="\\n")
    sys.exit(error.exit_code)
"""


class Done(NamedTuple):
    code: int
    out: str
    started: list[str]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frozen")
    (folder / "application.py").write_text(APPLICATION)
    command = [sys.executable, "-m", "PyInstaller", "--noconfirm", "--log-level", "WARN", "application.py"]
    known = [entry for entry in metadata.entry_points(group="pyinstaller40") if entry.module.startswith("acd_local.")]
    if not known:  # the package is not installed
        command += ["--additional-hooks-dir", str(HOOKS)]
    env = child_env(PYINSTALLER_CONFIG_DIR=str(folder / "config"))
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "dist" / "application" / "application"


@pytest.fixture
def run(program: Path, tmp_path: Path) -> Callable[..., Done]:
    def call(*args: str | Path) -> Done:
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        env = kept | {"APPLICATION_LOG": str(log), "ACD_CACHE_DIR": str(tmp_path / "cache")}
        done = subprocess.run([program, *args], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert "Traceback" not in done.stderr
        return Done(done.returncode, done.stdout, log.read_text().splitlines())

    return call


def test_it_answers(run: Callable[..., Done], demo: Path) -> None:
    question = "What is red wine?"
    with acd_local.load(demo, ctx_size=512, threads=1) as engine:
        answer = engine.chat().ask(question, max_tokens=12, temp=0.0, draft_max=0)
        expected = f"{engine.pair.name}\n{answer.text}\n"
    assert run(demo, question) == (0, expected, ["application", "child acd_local.runtime.probe"])
    assert run(demo, question) == (0, expected, ["application"]), "the file was not remembered"


def test_it_refuses_a_damaged_file(run: Callable[..., Done], tmp_path: Path) -> None:
    """One on which llama.cpp aborts: the application lives, and starts children but never itself."""
    path = tiny_gguf.write_llama(tmp_path / "m.gguf")
    key = b"llama.feed_forward_length"
    path.write_bytes(path.read_bytes().replace(key, b"llama.expert_group_count\0"))
    code, out, started = run(path, "hi")
    assert (code, out.splitlines()[0]) == (3, "ModelError")
    assert f"{path}: llama.cpp aborted while loading it (signal 6)" in out
    assert started == ["application", *["child acd_local.runtime.probe"] * 3]


def test_it_holds_what_it_needs_and_no_torch(program: Path) -> None:
    inside = program.parent / "_internal"
    for name in ("prompts/default.toml", "runtime/sample.gguf", "evaluate/methods.toml", "optimize/data/parts.json"):
        assert (inside / "acd_local" / name).is_file()
    assert list(inside.glob("llama_cpp/lib/*ggml-cpu*"))
    taken = {path.name for path in inside.iterdir()}
    assert not taken & {"torch", "transformers", "huggingface_hub", "tokenizers", "gguf"}
