"""Ctrl-C and SIGTERM in a chat: at a terminal the chat outlives a stopped answer, in a pipe it ends."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn, Protocol, Self

from acd_local.cli.shell import Interrupts


class Signals(Protocol):
    @contextmanager
    def answering(self, cancel: Callable[[], None]) -> Iterator[None]:
        """Let signals, while an answer is made, call `cancel`, also when llama.cpp holds the main thread."""


class PipeSignals:
    """Both signals stop the answer and then the program, with 128 + signal; without an answer at once."""

    def __init__(self, interrupts: Interrupts) -> None:
        self._interrupts = interrupts

    @contextmanager
    def answering(self, cancel: Callable[[], None]) -> Iterator[None]:
        with _cancelling(self._interrupts, cancel):
            yield
        if self._interrupts.exit_code is not None:
            raise SystemExit(self._interrupts.exit_code)


class TerminalSignals:
    """Ctrl-C stops the answer and nothing else; SIGTERM ends the program, the terminal restored."""

    def __enter__(self) -> Self:
        self._old = signal.signal(signal.SIGTERM, _terminate)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._old)

    @contextmanager
    def answering(self, cancel: Callable[[], None]) -> Iterator[None]:
        with _AnswerInterrupts() as interrupts, _cancelling(interrupts, cancel):
            yield
        if interrupts.signum == signal.SIGTERM:
            _terminate(signal.SIGTERM)


class _AnswerInterrupts(Interrupts):
    """Lasts for one answer, so a second Ctrl-C from an impatient user must not end the process."""

    def _handle(self, signum: int) -> None:
        if self.signum != signal.SIGTERM:
            self.signum = signum
        if self._token is not None:
            self._token.set()


@contextmanager
def _cancelling(interrupts: Interrupts, cancel: Callable[[], None]) -> Iterator[None]:
    from acd_local.runtime.cancel import CancelToken

    token = CancelToken()
    with token.interrupting(cancel):
        interrupts.cancels(token)
        try:
            yield
        finally:
            interrupts.cancels(None)


def _terminate(signum: int, _frame: FrameType | None = None) -> NoReturn:
    raise SystemExit(128 + signum)
