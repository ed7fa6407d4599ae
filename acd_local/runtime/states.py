"""Keeps sequence states on disk between runs: decoded system prompts, and on request whole conversations.

A state is what llama.cpp saves of one sequence. It holds for the tokens behind which it was taken and for all else
that decides its bits: model, machine, llama.cpp, settings. llama.cpp trusts it. So a file is taken only where it is
this user's alone, and where its checksum, its circumstances and its tokens are right; any other is deleted.

Files are bounded in total, the one that was unused for the longest goes first. Where they cannot be written or read
nothing is lost but the time that they would have saved: a line on the logger `acd_local.states` says so.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from acd_local import files
from acd_local.errors import AcdError
from acd_local.runtime import llama, machine
from acd_local.runtime.embeddings import EmbeddingTable
from acd_local.runtime.streams import Snapshot

FOLDER = "states"  # below files.cache_dir()
LIMIT = 1 << 30  # bytes of all files together
SHARE = 16  # a system prompt takes one part in so many of LIMIT at most
LEAST = 64  # tokens that a kept conversation must spare: fewer are decoded as soon

_MAGIC = b"acd-kv 1"  # the number is the format's
_SUMMED = len(_MAGIC) + 32  # from here on: behind the magic and the checksum
_HEAD = _SUMMED + 32 + 8  # behind the circumstances and the number of ids, which follow
_NO_OTHER = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # neither a link nor a pipe

Kind = Literal["system", "chat"]
Ids = NDArray[np.int64]

logger = logging.getLogger("acd_local.states")


def look_at(parts: Sequence[Path]) -> list[Any] | None:
    """Tell a model's files from all others without reading them; None: one is not there.

    To be asked before they are loaded. However a file is replaced, its inode's time of change is another.
    """
    try:
        stats = [(path.resolve(), path.stat()) for path in parts]
    except (OSError, RuntimeError):  # RuntimeError: a loop of symbolic links
        return None
    return [[str(path), s.st_size, s.st_mtime_ns, s.st_ctime_ns] for path, s in stats]


class StateStore:
    """The states of one model in one kind of context. Safe to use from several threads.

    Args:
        seen: the model's files, see `look_at`.
        embeddings: the model's rows: a state's soft prompt is known by what is in its rows.
        conversations: whether conversations are kept, and found, as well.
        settings: what else decides a state's bits, or whether llama.cpp takes it; JSON types.
    """

    def __init__(
        self, seen: list[Any], embeddings: EmbeddingTable, *, conversations: bool = False, **settings: object
    ) -> None:
        self.conversations = conversations
        self._embeddings = embeddings
        here = [machine.identity(), machine.extra_buffers(), llama.supports_gpu_offload()]
        self._around = hashlib.sha256(json.dumps([seen, here, settings], sort_keys=True).encode()).digest()
        cache = files.cache_dir()
        self._folder = None if cache is None else cache / FOLDER

    def find(self, tokens: Sequence[int]) -> Snapshot | None:
        """Return the state behind a system prompt, None where there is none."""
        ids = self._portable(tokens)
        return self._load(self._path("system", ids), ids, tokens)

    def find_conversation(self, prompt: Sequence[int], beyond: int, most: int, *, whole: bool) -> Snapshot | None:
        """Return the state of the conversation that spares most of a prompt; None: none spares LEAST tokens.

        What it holds beyond that the caller has to forget.

        Args:
            beyond: tokens of the prompt that are to be had anyway.
            most: tokens that a conversation may have.
            whole: nothing can be forgotten: the prompt has to go on behind all of it.
        """
        best, found = beyond + LEAST - 1, None
        if len(prompt) <= best:
            return None
        wanted = self._portable(prompt)
        for path, ids in self._conversations():
            common = _common(wanted, ids)
            if best < common and len(ids) <= most and (not whole or common == len(ids) < len(wanted)):
                best, found = common, (path, ids)
        if found is None:
            return None
        path, ids = found
        return self._load(path, ids, [*prompt[:best], *ids[best:].tolist()])

    def keep(self, snapshot: Snapshot) -> None:
        """Keep the state behind a system prompt, unless it is too large for that."""
        if len(snapshot.state) <= LIMIT // SHARE:
            ids = self._portable(snapshot.tokens)
            self._write(self._path("system", ids), ids, snapshot.state)

    def keep_conversation(self, snapshot: Snapshot, *, whole: bool) -> None:
        """Keep a conversation's state, in place of those that would spare fewer than LEAST tokens more.

        Args:
            whole: as in `find_conversation`; otherwise one that a longer one begins with is not kept.
        """
        ids = self._portable(snapshot.tokens)
        if len(ids) < LEAST:
            return
        others = [(path, held, _common(ids, held)) for path, held in self._conversations()]
        if not whole and any(common == len(ids) for _, _, common in others):
            return
        if self._write(self._path("chat", ids), ids, snapshot.state):
            for path, held, common in others:
                if common < len(ids) and len(held) - common < LEAST:
                    _delete(path)

    # -- what is in a file ---------------------------------------------------------------------------------------------

    def _portable(self, tokens: Sequence[int]) -> Ids:
        return self._embeddings.portable(tokens)

    def _path(self, kind: Kind, ids: Ids) -> Path | None:
        name = f"{self._around.hex()[:16]}-{hashlib.sha256(ids.tobytes()).hexdigest()[:32]}.{kind}"
        return None if self._folder is None else self._folder / name

    def _conversations(self) -> Iterator[tuple[Path, Ids]]:
        """List the conversations, by what their files say, which is not checked here."""
        for path in _listed(self._folder, f"{self._around.hex()[:16]}-*.chat"):
            with suppress(OSError), _opened(path) as file:
                count = int.from_bytes(file.read(_HEAD)[-8:], "little")
                ids = file.read(8 * min(count, 1 << 24))
                yield path, np.frombuffer(ids[: len(ids) // 8 * 8], "<i8")

    def _load(self, path: Path | None, ids: Ids, tokens: Sequence[int]) -> Snapshot | None:
        """Read a file that is to hold the state behind these tokens; delete it where it does not."""
        if path is None:
            return None
        try:
            with _opened(path) as file:
                content = file.read()
            os.utime(path)
        except FileNotFoundError:
            return None
        except OSError:
            content = b""
        head, body = self._head(ids), memoryview(content)[_SUMMED:]
        if content[:_SUMMED] != _MAGIC + _checksum(body) or body[: len(head)] != head:
            logger.info(f"{path.name} is damaged, or not ours: it is deleted")
            _delete(path)
            return None
        return Snapshot(tuple(tokens), body[len(head) :])

    def _head(self, ids: Ids) -> bytes:
        return self._around + len(ids).to_bytes(8, "little") + ids.astype("<i8").tobytes()

    def _write(self, path: Path | None, ids: Ids, state: bytes | memoryview) -> bool:
        """Write a file, unless it is there, and tell whether it is there now."""
        if path is None or self._folder is None:
            return False
        try:
            files.own_folder(self._folder)
            if not path.exists():
                head = self._head(ids)
                content = b"".join((_MAGIC, _checksum(head, state), head, state))
                if len(content) > LIMIT:
                    return False
                _make_room(self._folder, len(content))
                files.replace_file(path, content, mode=files.PRIVATE)
            return True
        except (OSError, ValueError, AcdError, MemoryError) as error:
            logger.info(f"a decoded prompt is not kept: {error}")
            return False


def _checksum(*parts: bytes | memoryview) -> bytes:
    seen = hashlib.sha256()
    for part in parts:
        seen.update(part)
    return seen.digest()


def _common(a: Ids, b: Ids) -> int:
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file that this user alone can have written; OSError where it is none, too large, or not there."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | _NO_OTHER)) as file:
        seen = os.fstat(file.fileno())
        alone = not hasattr(os, "getuid") or (seen.st_uid == os.getuid() and not seen.st_mode & 0o077)
        if not (alone and stat.S_ISREG(seen.st_mode) and seen.st_size <= LIMIT):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        yield file


def _listed(folder: Path | None, pattern: str) -> list[Path]:
    try:
        return [] if folder is None else list(folder.glob(pattern))
    except OSError:
        return []


def _make_room(folder: Path, size: int) -> None:
    """Delete what was unused for the longest until `size` more bytes are within LIMIT."""
    found = []
    for path in _listed(folder, "*"):
        with suppress(OSError):
            seen = path.lstat()
            found.append((seen.st_mtime_ns, seen.st_size, path))
    total = sum(held for _, held, _ in found) + size
    for _, held, path in sorted(found):
        if total <= LIMIT:
            return
        _delete(path)
        total -= held


def _delete(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
