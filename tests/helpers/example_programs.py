"""Starts the programs in examples/ as a user would, with an `acd-run` on the path that is this checkout's."""

from __future__ import annotations

import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from places import ROOT, child_env
from processes import is_running

EXAMPLES = ROOT / "examples"
ENDLESS = 'root ::= "a" root'
PATIENCE = 60.0  # seconds


def path_with_acd_run(folder: Path) -> str:
    """Write an acd-run into `folder`; returns a PATH that finds it first."""
    program = folder / "acd-run"
    python = f'PYTHONPATH={shlex.quote(str(ROOT))} exec {shlex.quote(sys.executable)} -c "$code" "$@"'
    program.write_text(f"#!/bin/sh\ncode='from acd_local.cli.run import main; main()'\n{python}\n")
    program.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def wait_until_gone(process: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while is_running(process):
        assert time.monotonic() < deadline, "the worker was left behind"
        time.sleep(0.02)


class Program:
    """A running example: lines in, and what it wrote so far, as it comes.

    Attributes:
        out, err: all of stdout and of stderr until now.
    """

    def __init__(self, command: list[str], **env: str) -> None:
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=child_env(**env),
            start_new_session=True,
            # A suite in the background ignores Ctrl-C, and so would what it starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.out = self.err = ""
        self._news: queue.Queue[tuple[str, str]] = queue.Queue()
        for name in ("out", "err"):
            threading.Thread(target=self._read, args=(name,), daemon=True).start()

    def _read(self, name: str) -> None:
        stream = self.process.stdout if name == "out" else self.process.stderr
        assert stream is not None
        while piece := os.read(stream.fileno(), 4096):
            self._news.put((name, piece.decode()))
        self._news.put((name, ""))

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def interrupt(self) -> None:
        """As Ctrl-C in a terminal does: everybody in the group gets the signal."""
        os.killpg(self.process.pid, signal.SIGINT)

    def until(self, name: str, text: str, count: int = 1) -> str:
        """Wait until `text` was written `count` times to "out" or "err"; returns all that was written there."""
        deadline = time.monotonic() + PATIENCE
        while getattr(self, name).count(text) < count:
            try:
                where, piece = self._news.get(timeout=deadline - time.monotonic())
            except (queue.Empty, ValueError):
                raise AssertionError(f"no {text!r} in {name}\nstdout: {self.out}\nstderr: {self.err}") from None
            setattr(self, where, getattr(self, where) + piece)
        return str(getattr(self, name))

    def end(self) -> tuple[int, str, str]:
        """Close its stdin and wait: exit code, stdout, stderr."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        code = self.process.wait(PATIENCE)
        for _ in range(2):
            while True:
                where, piece = self._news.get(timeout=PATIENCE)
                if not piece:
                    break
                setattr(self, where, getattr(self, where) + piece)
        return code, self.out, self.err

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)
