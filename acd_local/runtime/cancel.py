"""Stops an answer from another thread or a signal handler."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class CancelToken:
    """Set once, by any thread, at any time; the answer that carries it ends with finish_reason "cancelled".

    A decode that is running right now is stopped too: whoever decodes registers how, with `interrupting`.
    """

    def __init__(self) -> None:
        self._set = threading.Event()
        self._interrupts: list[Callable[[], None]] = []
        self._lock = threading.RLock()  # a late interrupt must not hit whoever decodes next

    @property
    def is_set(self) -> bool:
        return self._set.is_set()

    def set(self) -> None:
        self._set.set()
        with self._lock:
            for interrupt in self._interrupts:
                interrupt()

    @contextmanager
    def interrupting(self, interrupt: Callable[[], None]) -> Iterator[None]:
        """Let `set` call `interrupt` while inside. Check `is_set` after entering."""
        with self._lock:
            self._interrupts.append(interrupt)
        try:
            yield
        finally:
            with self._lock:
                self._interrupts.remove(interrupt)
