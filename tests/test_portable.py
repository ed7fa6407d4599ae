"""What can be said here about systems without POSIX: imports, names that are missing there, an answer without them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from places import child_env

import acd_local

ROOT = Path(acd_local.__file__).parent
# What Python has on Windows too lacks these; `asyncio`, numpy and the like are imported before they are taken away.
WITHOUT_POSIX = """
import asyncio, ctypes, importlib, json, logging, multiprocessing, os, pathlib, shutil, signal, socket, subprocess, sys
import tempfile, threading, click, click.shell_completion, filelock, jinja2, llama_cpp, llguidance, numpy, platformdirs
import prompt_toolkit, prompt_toolkit.input.defaults, rich.console, rich.markdown, rich.table, safetensors.numpy
import concurrent.futures, tomlkit, urllib.request
for name in "starlette.applications uvicorn huggingface_hub matplotlib.figure torch transformers llm".split():
    try: importlib.import_module(name)
    except ImportError: pass
MODULES = ("fcntl termios resource pwd grp readline tty pty curses syslog posix").split()
for name in MODULES:
    sys.modules[name] = None  # importing it is an ImportError
keep = {"SIGINT", "SIGTERM", "SIGABRT", "SIGFPE", "SIGILL", "SIGSEGV"}
for name in [n for n in dir(signal) if n.startswith("SIG") and n.isupper() and "_" not in n and n not in keep]:
    delattr(signal, name)
for owner, names in ((signal, "alarm setitimer pthread_kill pthread_sigmask sigwait siginterrupt"),
                     (os, "fork getuid geteuid getgid getpgid killpg setsid statvfs mkfifo chown uname nice wait4 "
                          "register_at_fork")):
    for name in names.split():
        if hasattr(owner, name):
            delattr(owner, name)
"""
EVERY_MODULE = """
import pkgutil, acd_local
missing = []
for found in pkgutil.walk_packages(acd_local.__path__, "acd_local."):
    if "__pyinstaller" in found.name:
        continue
    try:
        importlib.import_module(found.name)
    except ImportError as error:
        if (error.name or "") in MODULES or (error.name or "").startswith("acd_local"):
            missing.append(f"{found.name}: {error}")
print(missing)
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_POSIX + code]
    return subprocess.run(
        command, env=child_env(), capture_output=True, text=True, timeout=300, check=False, stdin=subprocess.DEVNULL
    )


def test_every_module_is_imported_without_posix() -> None:
    done = run(EVERY_MODULE)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_an_answer_is_made_without_posix(tiny: Callable[..., Path]) -> None:
    """A new model, checked in a child, with status lines, signals and files, as acd-run does it."""
    asked = ["acd-run", str(tiny("chatml")), "hi", "-n", "4", "-c", "512", "--json", "--no-stdin", "-t", "1"]
    done = run(f"sys.argv = {asked!r}\nfrom acd_local.cli.run import main\nmain()\n")
    assert done.returncode == 0 and '"finish_reason"' in done.stdout, done.stderr


def test_a_server_hears_signals_where_the_event_loop_takes_no_handlers(tiny: Callable[..., Path]) -> None:
    """asyncio's loop on Windows has none; Python's own handlers run between its steps."""
    pytest.importorskip("uvicorn")
    arguments = ["acd-serve", str(tiny("chatml")), "--port", "0", "-c", "512", "-t", "1", "--pair", "as-is"]
    code = f"""
def refuse(*_): raise NotImplementedError
asyncio.SelectorEventLoop.add_signal_handler = refuse
sys.argv = {arguments!r}
from acd_local.cli import serve
tell = serve._tell
def tell_and_stop(*args, **more):
    tell(*args, **more)
    threading.Timer(0.5, signal.raise_signal, [signal.SIGTERM]).start()
serve._tell = tell_and_stop
serve.main()
"""
    done = run(code)
    assert done.returncode == 143 and '"listening"' in done.stdout, done.stderr


# Names that Windows has not, and where they are used behind a question for them.
GUARDED = {
    ("files", "os.getuid"): "hasattr",
    ("files", "os.chown"): "hasattr",
    ("runtime/grammar", "signal.SIGPROF"): "sys.platform",
    ("runtime/grammar", "signal.setitimer"): "sys.platform",
    ("runtime/states", "os.getuid"): "hasattr",
    ("runtime/threads", "os.sched_getaffinity"): "sys.platform",
    ("tuning/memory", "os.sysconf"): "hasattr",
}
ONLY_POSIX = {
    "os": "chown fchmod fchown fork forkpty getegid geteuid getgid getgroups getloadavg getpgid getpgrp getpriority "
    "getsid getuid initgroups killpg lchown mkfifo mknod nice openpty posix_fadvise posix_spawn pread pwrite readv "
    "register_at_fork sched_getaffinity sched_yield sendfile setpgid setsid setuid statvfs sysconf tcgetpgrp ttyname "
    "uname wait wait3 wait4 WIFEXITED WNOHANG",
    "signal": "SIGALRM SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGPROF SIGQUIT SIGSTOP SIGTSTP SIGUSR1 SIGUSR2 "
    "SIGWINCH SIGXFSZ alarm pause pthread_kill pthread_sigmask setitimer siginterrupt sigtimedwait sigwait",
    "socket": "AF_UNIX SO_REUSEPORT",
    "time": "clock_gettime tzset",
}


@pytest.mark.parametrize("module", sorted(p.relative_to(ROOT).with_suffix("").as_posix() for p in ROOT.rglob("*.py")))
def test_names_that_windows_lacks_are_asked_for_first(module: str) -> None:
    tree = ast.parse((ROOT / f"{module}.py").read_text("utf-8"))
    used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    lacking = {f"{owner}.{name}" for owner, names in ONLY_POSIX.items() for name in names.split()}
    assert {(module, name) for name in used & lacking} <= set(GUARDED)
