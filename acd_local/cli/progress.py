"""Says how far something is: a long run, on one live line or a line now and then; a wait, on a line that goes again."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from acd_local.cli.flags import load_engine
from acd_local.cli.shell import one_line, say
from acd_local.runtime.lifetime import Closing

if TYPE_CHECKING:
    from acd_local.answers import PromptProgress
    from acd_local.engine import Engine
    from acd_local.progress import Progress

PATIENCE = 1.0  # seconds before a wait is spoken of
TERMINAL_EVERY = 0.2  # seconds
ELSEWHERE_EVERY = 30.0


class ProgressLine(Closing):
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
            with suppress(OSError, ValueError):  # as in say
                sys.stderr.write(f"\r\x1b[2K{line}")
                sys.stderr.flush()
            self._open = True
        else:
            say(line)

    def line(self, text: str) -> None:
        """Say something that stays."""
        self.close()
        say(f"{self._program}: {one_line(text)}")

    def close(self) -> None:
        if self._open:
            self._open = False
            say("")


def progress_text(progress: Progress) -> str:
    """Write a line: answers 120/600, 31 per minute, 15:29 left."""
    text = f"{progress.phase} {progress.done}/{progress.total}" if progress.total else progress.phase
    if progress.seconds_left is not None and progress.done < progress.total:
        minutes, seconds = divmod(round(progress.seconds_left), 60)
        left = f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"
        text += f", {progress.per_minute:.0f} per minute, {left} left"
    return f"{text}; {progress.note}" if progress.note else text


def load_with_status(model: str, given: Mapping[str, Any]) -> Engine:
    """Load a model as `flags.load_engine` does, with a status line while it lasts."""
    with StatusLine() as status:
        return load_engine(
            model,
            given,
            on_progress=lambda fraction: status.loading(model, fraction),
            on_check=lambda fraction: status.show(f"checking {one_line(Path(model).name)} {fraction:.0%}"),
        )


class StatusLine:
    """A line on a terminal's stderr about what is waited for: there after a second, and gone without a trace.

    `show` is called as often as there is news. A thread draws it, since news can be half a minute apart.
    """

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._text = ""
        self._width = 0  # of what is drawn
        self._drawn = 0.0

    def show(self, text: str) -> None:
        if not self._live:
            return
        with self._lock:
            self._text = text
            if self._timer is None:
                self._timer = threading.Timer(PATIENCE, self._appear)
                self._timer.daemon = True
                self._timer.start()
            elif self._width and time.monotonic() - self._drawn >= TERMINAL_EVERY:
                self._draw(text)

    def loading(self, model: str, fraction: float) -> None:
        """Say how much of a model is loaded, from 0 to 1."""
        self.show(f"loading {one_line(Path(model).name)}{f' {fraction:.0%}' if fraction else ''}")

    def reading(self, progress: PromptProgress) -> None:
        """Say how much of a prompt is decoded."""
        self.show(reading_text(progress))

    def clear(self) -> None:
        """Take the line away, before anything else is written to the terminal."""
        if not self._live:
            return
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if self._width:
                self._draw("")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def _appear(self) -> None:
        with self._lock:
            if self._timer is threading.current_thread():
                self._draw(self._text)

    def _draw(self, text: str) -> None:
        with suppress(OSError, ValueError):
            text = text[: (os.get_terminal_size(sys.stderr.fileno()).columns or 80) - 1]
        with suppress(OSError, ValueError):
            back = "" if text else "\r"
            sys.stderr.write(f"\r{text:<{self._width}}{back}")  # spaces: not every terminal can clear a line
            sys.stderr.flush()
        self._width, self._drawn = len(text), time.monotonic()


def reading_text(progress: PromptProgress) -> str:
    return f"reading the prompt {progress.done / progress.total:.0%}"
