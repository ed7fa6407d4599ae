"""Ask for the user's folders, and replace files whole.

Every folder and every file that this package writes for the user goes through here, so that a missing home, a full disk
and a symbolic link are answered the same way everywhere.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

import platformdirs

from acd_local.errors import AcdError, StorageError, UsageError

_APP = "acd-local"
_STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


def cache_dir() -> Path | None:
    """Return the folder for what can be made again: $ACD_CACHE_DIR, else the platform's; None where there is none."""
    return _folder("ACD_CACHE_DIR", platformdirs.user_cache_dir)


def config_dir() -> Path | None:
    """Return the folder for the user's own pairs and settings; None where there is none."""
    return _folder(None, platformdirs.user_config_dir)


def data_dir() -> Path | None:
    """Return the folder for what the user would miss, such as the chat's history; None where there is none."""
    return _folder(None, platformdirs.user_data_dir)


def _folder(variable: str | None, ask: object) -> Path | None:
    """A container may run without a home or a passwd entry: then platformdirs has no answer, or a relative one."""
    if variable is not None and (chosen := os.environ.get(variable)):
        return Path(chosen)
    try:
        found = Path(ask(_APP, appauthor=False))  # type: ignore[operator]
    except (OSError, RuntimeError, KeyError, ValueError):
        return None
    return found if found.is_absolute() and "~" not in found.parts else None


def replace_file(path: Path | str, content: bytes | str, *, mode: int = 0o666) -> None:
    """Replace a file's content, whole or not at all.

    A symbolic link is followed and stays; the mode of a file that is there is kept. A device or pipe is written to as it
    is.

    Args:
        content: a text is written as UTF-8; half of a surrogate pair becomes a question mark.
        mode: of a new file, before the umask.

    Raises:
        StorageError: the storage is full or fails; the old content is still there.
        UsageError: the file cannot be written otherwise: no permission, no such folder, no name for a file.
    """
    data = content if isinstance(content, bytes) else content.encode("utf-8", "replace")
    try:
        _replace(Path(path).expanduser(), data, mode)
    except (OSError, ValueError, RuntimeError) as error:
        raise write_error(path, error) from None


def _replace(path: Path, data: bytes, mode: int) -> None:
    target = Path(os.path.realpath(path))
    old = target.stat() if target.exists() else None
    if old is not None and not stat.S_ISREG(old.st_mode):
        target.write_bytes(data)
        return
    handle, draft = tempfile.mkstemp(dir=target.parent, prefix=".acd-", suffix=".tmp")
    try:
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(draft).chmod(mode & ~_umask() if old is None else stat.S_IMODE(old.st_mode))
        Path(draft).replace(target)
    except BaseException:
        with suppress(OSError):
            Path(draft).unlink()
        raise


def _umask() -> int:
    """The process's umask: Linux tells it; elsewhere it can only be read by setting it, which other threads would see."""
    with suppress(OSError, ValueError, IndexError):
        status = Path("/proc/self/status").read_text("ascii", "replace")
        return int(status.split("\nUmask:", 1)[1].split(None, 1)[0], 8)
    return 0o022


def write_error(path: Path | str, error: Exception) -> AcdError:
    """Turn what writing `path` raised into an error of ours: StorageError for the storage's fault, else UsageError."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(path))
    text = f"cannot write {shown[:200]}: {getattr(error, 'strerror', None) or error}"
    return StorageError(text) if is_storage_fault(error) else UsageError(text)


def is_storage_fault(error: Exception) -> bool:
    """Tell whether an error means that the storage is full or fails."""
    return isinstance(error, OSError) and error.errno in _STORAGE
