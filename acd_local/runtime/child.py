"""Runs one of this package's modules in a child process, where an abort of llama.cpp does no harm.

The child is this program again: the Python interpreter, or a frozen application that was built with our PyInstaller
hook. The hook's runtime part sees REENTER among the arguments before the application's own code runs, and says at every
start that it is there. Any other program would start itself all over again, and so none is ever started.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from acd_local.errors import InternalError

if TYPE_CHECKING:
    import subprocess

REENTER = "--acd-local-child"  # a frozen application's first argument where it is to be a child of ours
ANNOUNCED = "_acd_local_reenters"  # what the hook sets on `sys`
REENTERED = ("acd_local.runtime.probe", "acd_local.runtime.grammar")  # and nothing else
_MARK = "ACD_LOCAL_CHILD"  # in a child's environment: whatever it turns out to be, it starts none itself


def can_start() -> bool:
    """Tell whether a child can be started, and not somebody's application instead.

    Not where an application embeds Python or was frozen otherwise than by PyInstaller with our hook; nor in a child.
    """
    if os.environ.get(_MARK) or not sys.executable:
        return False
    if _frozen():
        return bool(getattr(sys, ANNOUNCED, False))
    return "__compiled__" not in globals() and Path(sys.executable).name.lower().startswith(("python", "pypy"))


def run_module(
    module: str, *args: str, text: str | None = None, timeout: float | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run `python -m module args`, importing from where this process does; stdout and stderr are captured.

    Args:
        module: in a frozen application one of REENTERED.
        text: what the child reads on stdin. None: a pipe that ends when this process does, for a child to watch.
        timeout: seconds; the child is killed when they are over.

    Raises:
        InternalError: no child can be started here.
        TimeoutError, OSError.
    """
    if not can_start():
        raise InternalError("no child process can be started here")
    import subprocess  # slow to import

    watched, held = os.pipe()
    try:
        return subprocess.run(
            _command(module, *args),
            env=_environment(),
            capture_output=True,
            timeout=timeout,
            check=False,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
            stdin=watched if text is None else None,
            input=None if text is None else text.encode(),
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"{module} did not end within {timeout:g} s") from None
    finally:
        os.close(watched)
        os.close(held)


def reenter(module: str = "", *args: str) -> NoReturn:
    """Be a child of ours in a frozen application, as `python -m module args` would, and end the process."""
    if module not in REENTERED:
        sys.exit(f"{module} is no child of acd_local")
    import runpy  # slow to import

    sys.argv[1:] = args
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    sys.exit(0)


def _frozen() -> bool:
    return bool(getattr(sys, "frozen", False))


def _command(module: str, *args: str) -> list[str]:
    if _frozen():
        return [sys.executable, REENTER, module, *args]
    return [sys.executable, "-P", "-m", module, *args]  # -P keeps the working directory out of the imports


def _environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[2])
    env = os.environ | {
        _MARK: "1",
        "GGML_NO_BACKTRACE": "1",  # ggml's own backtrace can hang
        "PYTHONPATH": os.pathsep.join([root, *filter(None, sys.path)]),
        "PYTHONIOENCODING": "utf-8",
    }
    env.pop("PYTHONFAULTHANDLER", None)
    return env
