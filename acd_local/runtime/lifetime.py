"""Decides who may use llama.cpp's memory and who frees it: in one thread at a time, in one process, until that ends."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Self

from acd_local.errors import EngineClosedError

PATIENCE = 5.0  # seconds that the end of the process waits for a call that cannot be stopped (some GPU backends)

CLOSED = "the engine was closed"
ENDING = "the process is ending: nothing new can be decoded"
FORKED = (
    "a forked process cannot go on with its parent's llama.cpp, whose threads it does not have: with multiprocessing "
    "use the start method 'spawn' or 'forkserver', and load the engine in the child"
)


class DecodeAborted(Exception):
    """A decode was stopped: by `Context.cancel()`, or as the process ends. The caches hold whole, finished batches."""


class _StoppedByEnd(EngineClosedError, DecodeAborted):
    """The process is ending: an answer that is being made ends as cancelled, anything else with an error."""


class Closing:
    """Something that the end of a `with` block closes."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Owned:
    """Something of llama.cpp's that has to be freed: by `close`, or when its owner is garbage, whichever comes first.

    `with owned as pointer:` uses it; nobody frees it meanwhile. That raises EngineClosedError after `close` and in a
    forked child, and while the process ends an error that is DecodeAborted too.

    Args:
        owner: the object that the memory belongs to, None for one that lives as long as the process.
        free: takes the pointer. Neither this nor `stop` may refer to the owner.
        lock: a threading.RLock, shared by what is used together; None makes one.
        stop: called from any thread, makes a running call return soon.
    """

    def __init__(
        self,
        owner: object | None,
        free: Callable[[Any], object],
        *,
        lock: Any = None,
        stop: Callable[[], object] | None = None,
    ) -> None:
        self._pointer: Any = None
        self._free: Callable[[Any], object] | None = free
        self._stop = stop
        self._lock: Any = lock or threading.RLock()
        self._pid = os.getpid()
        if owner is not None:
            self.belong_to(owner)

    def belong_to(self, owner: object) -> None:
        """Free it when `owner` is garbage, at the latest."""
        weakref.finalize(owner, self.close).atexit = False  # at exit, `end` alone decides

    def make(self, make: Callable[[], Any]) -> Any:
        """Call `make` for the pointer and return it, None for a null pointer; the end of the process waits for this.

        Raises:
            EngineClosedError: llama.cpp cannot be begun with in this process.
        """
        _owned[self] = None
        with self._lock:
            _check_begin()
            self._pointer = make() or None
            if self._pointer is None:  # it may have been stopped
                _check_begin()
        return self._pointer

    @property
    def foreign(self) -> bool:
        """Whether this is a forked child of the process that it belongs to."""
        return self._pid != os.getpid()

    def check(self) -> None:
        """Check that something new can be begun with it; never waits.

        Raises:
            EngineClosedError: it cannot.
        """
        if self.foreign:
            raise EngineClosedError(FORKED)
        if self._pointer is None:
            raise EngineClosedError(CLOSED)
        if _ending:
            raise EngineClosedError(ENDING)

    def close(self) -> None:
        """Free it, once; waits for who is inside. In a forked child this does nothing."""
        if not self.foreign:
            with self._lock:
                self._release()

    def _release(self) -> None:
        _owned.pop(self, None)
        pointer, self._pointer = self._pointer, None
        free, self._free = self._free, None  # which may keep other memory alive
        if pointer is not None and free is not None:
            free(pointer)

    def __enter__(self) -> Any:
        if self.foreign:  # first: a thread that this process does not have may hold the lock
            raise EngineClosedError(FORKED)
        self._lock.acquire()
        if self._pointer is None or _ending:
            self._lock.release()
            raise EngineClosedError(CLOSED) if self._pointer is None else _StoppedByEnd(ENDING)
        return self._pointer

    def __exit__(self, *_: object) -> None:
        self._lock.release()


_owned: dict[Owned, None] = {}  # in the order in which they were made: contexts after their model
_ending = False
_used_in: int | None = None  # the process whose threads llama.cpp has started


def ending() -> bool:
    """Tell whether the process is ending."""
    return _ending


def note_use() -> None:
    """Note that llama.cpp is about to start threads: GNU's OpenMP hangs in a process that is forked after that."""
    global _used_in
    _used_in = os.getpid()


def _check_begin() -> None:
    if _ending:
        raise EngineClosedError(ENDING)
    if _used_in not in (None, os.getpid()):
        raise EngineClosedError(FORKED)


def end(*, free: bool) -> None:
    """Stop what is running and let nothing begin, as the process ends: so that no thread is inside llama.cpp.

    Args:
        free: release all memory too, contexts before their models. Else it is left to the system: a thread may still
            look at logits.
    """
    global _ending
    _ending = True
    ours = [owned for owned in reversed(list(_owned)) if not owned.foreign]
    for owned in ours:
        if owned._stop is not None:
            owned._stop()
    deadline = time.monotonic() + PATIENCE
    for owned in ours:
        if not owned._lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            return  # what it uses must not be freed either
        if free:
            owned._release()
        owned._lock.release()
