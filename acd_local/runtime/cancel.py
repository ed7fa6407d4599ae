"""Stopping an answer from another thread or a signal handler."""

from __future__ import annotations

import threading
from collections.abc import Callable


class CancelToken:
    """Set once, by any thread, at any time; the answer that carries it ends with finish_reason "cancelled".

    A decode that is running right now is stopped too: whoever decodes registers how with `interrupting`.
    """

    def __init__(self) -> None:
        self._set = threading.Event()
        self._interrupt: Callable[[], None] | None = None

    @property
    def is_set(self) -> bool:
        return self._set.is_set()

    def set(self) -> None:
        self._set.set()
        interrupt = self._interrupt
        if interrupt is not None:
            interrupt()

    def interrupting(self, interrupt: Callable[[], None] | None) -> None:
        """What `set` has to call while a decode runs; None when none does. Check `is_set` after registering."""
        self._interrupt = interrupt
