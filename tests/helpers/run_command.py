"""Starts acd-run as a process, and says how it ended."""

from __future__ import annotations

import io
import subprocess
import sys
from typing import Any, NamedTuple

from places import child_env

MAIN = "from acd_local.cli.run import main; main()"
PAIR = 'format = 1\nname = "short"\nsafe = "You are kind."\nadversarial = "A demon answers."\n'
ENDLESS = 'root ::= "a" root'
LONG = "the water is blue and the wine is red " * 150


class Done(NamedTuple):
    code: int
    out: str
    err: str


class FakeStdin(io.TextIOWrapper):
    """Bytes instead of the test runner's stdin; None is a terminal."""

    def __init__(self, data: bytes | None) -> None:
        super().__init__(io.BytesIO(data or b""))
        self._terminal = data is None

    def isatty(self) -> bool:
        return self._terminal


def start(args: tuple[str, ...], *, code: str = MAIN, **how: Any) -> subprocess.Popen[bytes]:
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code, *args], env=child_env(), **(streams | how))


def subprocess_run(args: tuple[str, ...], **how: Any) -> Done:
    process = start(args, **how)
    out, err = process.communicate(timeout=120)
    return Done(process.returncode, (out or b"").decode(), (err or b"").decode())


def one_line_error(done: Done, code: int, *parts: str) -> None:
    assert done.code == code, done
    assert done.out == ""
    assert done.err.startswith("acd-run: ")
    assert done.err.count("\n") == 1
    assert done.err.endswith("\n")
    assert "Traceback" not in done.err
    for part in parts:
        assert part in done.err
