"""Ask for the user's folders, and replace files whole.

Every folder and every file that this package writes for the user goes through here, so that a missing home, a full disk
and a symbolic link are answered the same way everywhere.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any, Literal

from acd_local.errors import AcdError, StorageError, UsageError, shown

PRIVATE = 0o600  # the mode of files that nobody but the user should read

_APP = "acd-local"
_NO_NEW_FILE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EXDEV}  # EBUSY: a file mounted by itself
_STREAMS = ("/dev/", "/proc/")
_STORAGE = {  # its faults, and what to do
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room in your quota",
    errno.EFBIG: "a limit on the size of files is in force (ulimit -f)",
    errno.EIO: "see whether the disk is in order",
}
_DRAFT_AGE = 3600.0  # seconds: a draft that nobody has written to for so long was left by a process that was killed
_kept: dict[tuple[Path | None, Path], str] = {}  # by `keep`, where it could not be written
_swept: set[Path] = set()  # folders whose old drafts are deleted


# --- Folders ----------------------------------------------------------------------------------------------------------


def cache_dir() -> Path | None:
    """Return the folder for what can be made again: $ACD_CACHE_DIR, else the platform's; None where there is none."""
    if chosen := os.environ.get("ACD_CACHE_DIR"):
        return Path(chosen)
    return _folder("cache")


def config_dir() -> Path | None:
    """Return the folder for the user's own pairs and settings: $ACD_CONFIG_DIR, else the platform's, if any."""
    if chosen := os.environ.get("ACD_CONFIG_DIR"):
        return Path(chosen)
    return _folder("config")


def data_dir() -> Path | None:
    """Return the folder for what the user would miss, such as the chat's history; None where there is none."""
    return _folder("data")


def work_dir() -> Path:
    """Make the folder for what takes hours to compute: `cache_dir()`, else one under the temporary folder.

    The latter is this user's alone, and only taken where ACD_CACHE_DIR names no folder.

    Raises:
        UsageError, StorageError: it cannot be made; the message names ACD_CACHE_DIR.
    """
    import tempfile  # slow to import

    found = cache_dir()
    try:
        if found is not None and (os.environ.get("ACD_CACHE_DIR") or _can_make(found)):
            found.mkdir(parents=True, exist_ok=True)
            return found
        return own_folder(Path(tempfile.gettempdir()) / f"{_APP}-{getattr(os, 'getuid', int)()}")
    except (OSError, ValueError) as error:
        kind = StorageError if is_storage_fault(error) else UsageError
        raise kind(f"no folder to work in ({reason(error)}): set ACD_CACHE_DIR to one") from None


def _can_make(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return is_storage_fault(error)  # to be told, not to be passed by
    return os.access(folder, os.W_OK)


def _folder(kind: Literal["cache", "config", "data"]) -> Path | None:
    """Ask platformdirs, which has no answer, or a relative one, in a container without a home or a passwd entry."""
    import platformdirs  # slow to import

    ask = {
        "cache": platformdirs.user_cache_dir,
        "config": platformdirs.user_config_dir,
        "data": platformdirs.user_data_dir,
    }
    try:
        found = Path(ask[kind](_APP, appauthor=False))
    except (OSError, RuntimeError, KeyError, ValueError):
        return None
    return found if found.is_absolute() else None


def own_folder(path: Path) -> Path:
    """Make a folder that this user alone can read and write; return it.

    Raises:
        OSError: it cannot be made, or what is there is another user's, or open to others: in the temporary folder
            anybody could have put one, or a link to one of theirs.
    """
    with suppress(FileExistsError):
        path.mkdir(mode=0o700, parents=True)
    found = path.lstat()
    ours = not hasattr(os, "getuid") or (found.st_uid == os.getuid() and not found.st_mode & 0o077)
    if not stat.S_ISDIR(found.st_mode) or not ours:
        raise PermissionError(errno.EACCES, f"{shown(path)} is another user's")
    return path


# --- Small things that can be made again ------------------------------------------------------------------------------


def keep(name: Path | str, text: str) -> bool:
    """Keep a text for later processes; for this one alone where the cache folder cannot be had or written.

    Args:
        name: a path below `cache_dir()`.

    Returns:
        Whether later processes find it.
    """
    folder = cache_dir()
    try:
        if folder is None:
            raise FileNotFoundError
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        replace_file(folder / name, text)
    except (OSError, ValueError, AcdError):
        _kept[folder, Path(name)] = text
        return False
    _kept.pop((folder, Path(name)), None)
    return True


def kept(name: Path | str, *, max_age: float | None = None) -> str | None:
    """Return what `keep` was given last under this name, or None.

    Args:
        max_age: seconds; what was written earlier is not taken.
    """
    folder = cache_dir()
    if (newer := _kept.get((folder, Path(name)))) is not None:
        return newer
    with suppress(OSError, ValueError):
        if folder is not None:
            if max_age is not None and time.time() - (folder / name).stat().st_mtime > max_age:
                return None
            return (folder / name).read_text("utf-8")
    return None


# --- Reading ----------------------------------------------------------------------------------------------------------


def read_bytes(path: Path, most: int, advice: str, kind: type[AcdError] = UsageError) -> bytes:
    """Read a file of at most `most` bytes.

    Args:
        advice: what to do about a larger one.
        kind: of the error, one line with the file's name and what is wrong with it.
    """
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except (OSError, ValueError) as error:
        raise kind(f"{shown(path)}: cannot be read: {reason(error)}") from None
    if len(data) > most:
        raise kind(f"{shown(path)}: larger than {most // 1_000_000} MB: {advice}")
    return data


def read_text(path: Path, most: int, advice: str, kind: type[AcdError] = UsageError) -> str:
    """Read a file of UTF-8 text: a byte order mark is left out, and lines end in \\n."""
    data = read_bytes(path, most, advice, kind)

    def line_at(offset: int) -> str:
        number = data.count(b"\n", 0, offset) + 1
        return f"{shown(path)}: line {number}"

    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise kind(f"{shown(path)}: UTF-16, not UTF-8: save the file in that encoding")
    if (nul := data.find(b"\0")) >= 0:
        raise kind(f"{line_at(nul)}: holds a NUL byte: UTF-16, or no text; save the file as UTF-8")
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise kind(f"{line_at(error.start)}: not UTF-8: save the file in that encoding") from None


# --- Writing ----------------------------------------------------------------------------------------------------------


def expand(path: Path | str) -> Path:
    """Replace ~ and ~user, where no shell did it.

    Raises:
        FileNotFoundError: there is no such user, or this one has no home.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise FileNotFoundError(errno.ENOENT, "no home folder is known for this name", str(path)) from None


def replace_file(path: Path | str, content: bytes | str, *, mode: int = 0o666) -> None:
    """Replace a file's content, whole or not at all.

    A symbolic link is followed and stays; owner and mode of a file that is there are kept. A device, a pipe and what
    lies in /dev is written to as it is. A file in a folder that takes no new file is overwritten in place: there a kill
    can leave it half-written.

    Args:
        content: a text is written as UTF-8; half of a surrogate pair becomes a question mark.
        mode: of a new file, before the umask.

    Raises:
        StorageError: the storage is full or fails; the old content is still there.
        UsageError: the file cannot be written otherwise: no permission, no such folder, no name for a file.
    """
    data = content if isinstance(content, bytes) else content.encode("utf-8", "replace")
    try:
        _replace(Path(path), data, mode)
    except (OSError, ValueError) as error:
        raise write_error(path, error) from None


def move_file(made: Path, path: Path) -> None:
    """Put a finished file in the place of another, as `replace_file` would have written it there.

    Raises:
        StorageError, UsageError: as `replace_file`.
    """
    try:
        old, target = _look(path)
        if old is not None and stat.S_ISREG(old.st_mode):
            _make_alike(made, old)
        if old is None or stat.S_ISREG(old.st_mode):
            made.replace(target)
            return
    except OSError:  # such as a link to another file system
        pass
    replace_file(path, made.read_bytes())
    made.unlink()


@contextmanager
def locked(path: Path, taken: str, *, private: bool = False, patience: float = 0.0) -> Iterator[None]:
    """Hold a lock file, which stays when the lock is free again, for this process alone.

    Args:
        taken: what the error says where another process holds it.
        private: no other user may read it.
        patience: seconds to wait for another process.

    Raises:
        UsageError, StorageError: another process holds it, or it cannot be made.
    """
    import filelock  # slow to import

    try:
        held = filelock.FileLock(path, timeout=patience, mode=PRIVATE if private else 0o644).acquire()
    except filelock.Timeout:
        raise UsageError(taken) from None
    except OSError as error:
        raise write_error(path, error) from None
    with held:
        yield


class JsonLines:
    """Keeps JSON records, one a line, in a file that is only ever added to.

    Args:
        path: made where it is missing; what a crash left of a last line is cut.
        mode: of a new file, before the umask.

    Raises:
        StorageError, UsageError: the file cannot be read or written; also when a record is added, which then is not
            there at all.
    """

    def __init__(self, path: Path, *, mode: int = 0o666) -> None:
        self.path = path
        try:
            with open(path, "ab+", opener=lambda name, flags: os.open(name, flags, mode)) as file:
                file.seek(0)
                data = file.read()
                if not data.endswith(b"\n"):
                    file.truncate(data.rfind(b"\n") + 1)
        except OSError as error:
            raise write_error(path, error) from None

    def read(self) -> list[bytes]:
        """Read all lines, without their ends."""
        return self.path.read_bytes().split(b"\n")[:-1]

    def add(self, record: Mapping[str, Any]) -> None:
        """Add a record; what is written, a crash of this process cannot lose."""
        line = json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        try:
            with self.path.open("ab", buffering=0) as file:
                size = file.tell()
                try:
                    while line:
                        line = line[file.write(line) :]
                except OSError:
                    with suppress(OSError):
                        file.truncate(size)
                    raise
        except OSError as error:
            raise write_error(self.path, error) from None


def check_place(path: Path | str) -> None:
    """Raise what `replace_file` would, as far as it can be told before there is any content."""
    try:
        old, target = _look(Path(path))
        if old is None:
            handle, draft = _draft(target.parent, PRIVATE)
            os.close(handle)
            Path(draft).unlink()
        elif stat.S_ISDIR(old.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    except (OSError, ValueError) as error:
        raise write_error(path, error) from None


def _replace(path: Path, data: bytes, mode: int) -> None:
    old, target = _look(path)
    if old is not None and (not stat.S_ISREG(old.st_mode) or str(path).startswith(_STREAMS)):
        with path.open("ab") as stream:
            stream.write(data)
        return
    try:
        handle, draft = _draft(target.parent, mode if old is None else PRIVATE)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                _sync(file.fileno())
            if old is not None:
                _make_alike(draft, old)
            draft.replace(target)
        except BaseException:
            with suppress(OSError):
                draft.unlink()
            raise
    except OSError as error:
        if old is None or error.errno not in _NO_NEW_FILE:
            raise
        _overwrite(target, data)


def _overwrite(target: Path, data: bytes) -> None:
    """Write over a file's content; where that fails, write the old one back, whose room is still there."""
    with target.open("r+b", buffering=0) as file:
        old = file.read()
        try:
            _write_over(file, data)
        except OSError:
            with suppress(OSError):
                _write_over(file, old)
            raise


def _write_over(file: FileIO, data: bytes) -> None:
    file.seek(0)
    written = 0
    while written < len(data):
        written += file.write(memoryview(data)[written:])
    file.truncate()


def _sync(descriptor: int) -> None:
    """Sync to the disk: a crash could leave an empty file, and some file systems say only now that they are full."""
    try:
        os.fsync(descriptor)
    except OSError as error:  # not every file system can
        if is_storage_fault(error):
            raise


def _look(path: Path) -> tuple[os.stat_result | None, Path]:
    """Look at a path, and at the file that links lead to; a file that is there must be ours to write."""
    try:
        old = path.stat()
    except FileNotFoundError:
        old = None
    if old is not None and not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return old, Path(os.path.realpath(path))


def _draft(folder: Path, mode: int) -> tuple[int, Path]:
    """Open a new file for writing; its short name fits wherever the target's does."""
    path = folder / f".acd-{os.urandom(6).hex()}.tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    handle = os.open(path, flags, mode)
    if folder not in _swept:
        _swept.add(folder)
        _delete_drafts(folder, older_than=os.fstat(handle).st_mtime - _DRAFT_AGE)  # by the clock of the folder's disk
    return handle, path


def _delete_drafts(folder: Path, older_than: float) -> None:
    """Delete what processes left that were killed while they wrote."""
    with suppress(OSError):
        for path in folder.glob(".acd-*.tmp"):
            with suppress(OSError):
                if path.lstat().st_mtime < older_than:
                    path.unlink()


def _make_alike(draft: Path, old: os.stat_result) -> None:
    made = draft.stat()
    if hasattr(os, "chown") and (made.st_uid, made.st_gid) != (old.st_uid, old.st_gid):
        with suppress(OSError):  # only root may give files away
            os.chown(draft, old.st_uid, old.st_gid)
    draft.chmod(stat.S_IMODE(old.st_mode))


# --- Errors -----------------------------------------------------------------------------------------------------------


def reason(error: Exception) -> str:
    """Say in a few words why a file cannot be read or written."""
    if isinstance(error, UnicodeEncodeError):
        return "its name holds half a surrogate pair"
    return getattr(error, "strerror", None) or str(error)


def write_error(path: Path | str, error: Exception) -> AcdError:
    """Turn what writing `path` raised into an error of ours: StorageError for the storage's fault, else UsageError."""
    text = f"cannot write {shown(path)}: {reason(error)}"
    if not isinstance(error, OSError) or not is_storage_fault(error):
        return UsageError(text)
    return StorageError(f"{text}: {_STORAGE[error.errno or 0]}")


def is_storage_fault(error: BaseException) -> bool:
    """Tell whether an error means that the storage is full or fails."""
    return isinstance(error, OSError) and error.errno in _STORAGE
