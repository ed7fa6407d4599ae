"""Kills a process, or fills its disk, in the middle of what it writes: at a point that is counted, not timed.

A point is a file or a folder that is made, a write, a sync, a renaming, a truncation or a removal below one folder. The
process begins with `begin`, and does what FAULTS says:

    kill:N    at point N it is killed; of a write there, half of the bytes are in the file
    full:N    from point N on there is no room, for half of a write there and for whatever comes then
    count:0   nothing happens; how many points there were is in the file FAULTS_COUNT at the end
"""

from __future__ import annotations

import _pyio
import atexit
import builtins
import errno
import io
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from places import ROOT, child_env

BEGIN = "import faults; faults.begin()\n"

# --- the tests' side --------------------------------------------------------------------------------------------------


class Done(NamedTuple):
    code: int
    out: str
    err: str
    points: int  # passed until the end; only counted by "count"


def run(code: str, args: Sequence[str], folder: Path, fault: str = "count:0", *, text: str = "", **env: str) -> Done:
    """Run a Python program with a fault in what it writes below `folder`."""
    count = Path(tempfile.gettempdir()) / f"points-{os.getpid()}"
    where = {"FAULTS": fault, "FAULTS_FOLDER": str(folder), "FAULTS_COUNT": str(count)}
    path = os.pathsep.join([str(ROOT / "tests" / "helpers"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + code, *args],
        env=child_env(**where, **env) | {"PYTHONPATH": path},
        input=text,
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    points = int(count.read_text()) if count.exists() else 0
    count.unlink(missing_ok=True)
    return Done(done.returncode, done.stdout, done.stderr, points)


def drafts(folder: Path) -> list[Path]:
    """What killed processes have left of files that they were writing."""
    return [path for path in folder.rglob(".acd-*.tmp") if path.is_file()]


@contextmanager
def small_disk(place: Path, size: str = "64k") -> Iterator[Path]:
    """Mount a small file system; the test is skipped where that is not allowed."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a small disk here")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def fill(disk: Path, leave: int = 0) -> Path:
    """Leave so many bytes on a disk; returns the file that takes the others."""
    filler = disk / "filler"
    with filler.open("ab", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    os.truncate(filler, filler.stat().st_size - leave)
    return filler


# --- the child's side -------------------------------------------------------------------------------------------------


class _Faults:
    def __init__(self, kind: str, at: int, folder: str) -> None:
        self._kind, self._at, self._folder = kind, at, os.path.realpath(folder) + os.sep
        self._paths: dict[int, str] = {}  # by file descriptor
        self.count = 0

    def opened(self, descriptor: int, path: Any) -> int:
        self._paths[descriptor] = os.path.realpath(os.fsdecode(path))
        return descriptor

    def point(self, what: Any, *, grows: bool = False) -> bool:
        """Count a point, if `what` lies in the folder; whether half of it is still to be done.

        Raises:
            OSError: there is no room for what `grows`.
        """
        path = self._paths.get(what, "") if isinstance(what, int) else os.path.realpath(os.fsdecode(what))
        if not path.startswith(self._folder):
            return False
        self.count += 1
        if self._kind == "full" and grows and self.count > self._at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        return self.count == self._at

    def hit(self) -> None:
        if self._kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)

    def before(self, call: Callable[..., Any], *, grows: bool = False) -> Callable[..., Any]:
        """Make a function of a path or a descriptor a point, which is hit before it does anything."""

        def counted(what: Any, *args: Any, **given: Any) -> Any:
            folder = self._paths.get(given.get("dir_fd"), "")
            if self.point(what if isinstance(what, int) else os.path.join(folder, what), grows=grows):  # noqa: PTH118
                self.hit()
                if grows:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), what)
            return call(what, *args, **given)

        return counted


def begin() -> None:
    """Put the faults that the environment asks for into this process."""
    kind, _, at = os.environ["FAULTS"].partition(":")
    faults = _Faults(kind, int(at), os.environ["FAULTS_FOLDER"])
    real_os_open, real_open, make = os.open, open, faults.before(os.mkdir, grows=True)
    new_file = faults.before(lambda path: None, grows=True)

    def os_open(path: Any, flags: int, *args: Any, **given: Any) -> int:
        if flags & os.O_CREAT and not os.path.lexists(path):
            new_file(path)
        return faults.opened(real_os_open(path, flags, *args, **given), path)

    class File(io.FileIO):
        def write(self, data: Any) -> int:
            if not stat.S_ISREG(os.fstat(self.fileno()).st_mode) or not faults.point(self.fileno(), grows=True):
                return super().write(data)
            half = bytes(data)[: len(data) // 2]
            written = super().write(half) if half else 0
            faults.hit()
            if not half:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return written

        def truncate(self, size: int | None = None) -> int:
            if faults.point(self.fileno()):
                faults.hit()
            return super().truncate(size)

    for name in ("BufferedWriter", "BufferedRandom", "BufferedReader", "TextIOWrapper"):
        setattr(_pyio, name, getattr(io, name))
    _pyio.FileIO = File  # type: ignore[misc, assignment]

    def opened(file: Any, mode: str = "r", *args: Any, **given: Any) -> Any:
        if not set(mode) & set("wax+"):
            return real_open(file, mode, *args, **given)
        if not isinstance(file, int) and given.get("opener") is None:
            given["opener"] = lambda path, flags: os_open(path, flags, 0o666)
        return _pyio.open(file, mode, *args, **given)

    builtins.open = io.open = opened  # type: ignore[assignment]
    os.open, os.mkdir = os_open, make  # type: ignore[assignment]
    for name in ("fsync", "replace", "rename", "unlink", "remove", "rmdir", "ftruncate"):
        setattr(os, name, faults.before(getattr(os, name)))
    if kind == "count":
        atexit.register(lambda: Path(os.environ["FAULTS_COUNT"]).write_text(str(faults.count)))
