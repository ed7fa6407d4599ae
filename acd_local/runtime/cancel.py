"""Stops an answer from another thread or a signal handler."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress


class CancelToken:
    """Set once, by any thread, at any time; the answer that carries it ends with finish_reason "cancelled".

    A decode that is running right now is stopped too: whoever decodes registers how, with `interrupting`.
    """

    def __init__(self) -> None:
        self._set = threading.Event()
        self._interrupts: list[Callable[[], object]] = []
        self._lock = threading.RLock()  # a late interrupt must not hit whoever decodes next

    @property
    def is_set(self) -> bool:
        return self._set.is_set()

    def set(self) -> None:
        self._set.set()
        with self._lock:
            for interrupt in self._interrupts:
                interrupt()

    def interrupting(self, interrupt: Callable[[], object]) -> Interrupting:
        """Let `set` call `interrupt` while inside. Check `is_set` after entering."""
        return Interrupting([self], interrupt)


class Interrupting:
    """Lets the `set` of any of some tokens call `interrupt`, between entry and exit: of every step of an answer."""

    def __init__(self, tokens: Sequence[CancelToken], interrupt: Callable[[], object]) -> None:
        self._tokens, self._interrupt = tokens, interrupt

    def __enter__(self) -> None:
        for token in self._tokens:
            with token._lock:
                token._interrupts.append(self._interrupt)

    def __exit__(self, *_: object) -> None:
        for token in self._tokens:
            with token._lock, suppress(ValueError):  # the entry was interrupted itself
                token._interrupts.remove(self._interrupt)
