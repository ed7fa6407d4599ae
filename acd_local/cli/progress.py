"""Progress of a long run: one live line on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from acd_local.cli.shell import say

if TYPE_CHECKING:
    from acd_local.evaluate.runner import Progress

TERMINAL_EVERY = 0.2  # seconds
ELSEWHERE_EVERY = 30.0


class ProgressLine:
    """`show` may be called as often as one likes; `close` leaves the cursor on a fresh line."""

    def __init__(self, program: str) -> None:
        self._program = program
        self._live = sys.stderr.isatty()
        self._shown = 0.0
        self._phase = ""
        self._open = False

    def show(self, progress: Progress) -> None:
        now = time.monotonic()
        new = progress.phase != self._phase
        due = now - self._shown >= (TERMINAL_EVERY if self._live else ELSEWHERE_EVERY)
        if not (new or due or progress.done == progress.total):
            return
        if new:
            self.close()
        self._shown, self._phase = now, progress.phase
        line = f"{self._program}: {progress_text(progress)}"
        if self._live:
            sys.stderr.write(f"\r\x1b[2K{line}")
            sys.stderr.flush()
            self._open = True
        else:
            say(line)

    def close(self) -> None:
        if self._open:
            self._open = False
            say("")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def progress_text(progress: Progress) -> str:
    """answers 120/600, 31 per minute, 15:29 left"""
    text = f"{progress.phase} {progress.done}/{progress.total}" if progress.total else progress.phase
    if progress.seconds_left is not None and progress.done < progress.total:
        minutes, seconds = divmod(round(progress.seconds_left), 60)
        left = f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"
        text += f", {progress.per_minute:.0f} per minute, {left} left"
    return f"{text}; {progress.note}" if progress.note else text
